"""Progress: a bar with loss, tokens per second and ETA on a terminal, otherwise about ten plain lines."""

import time
from typing import Any

import lightning
from lightning import Trainer

from callbacks.remaining_time import remaining_seconds
from callbacks.shown_phases import ShowsPhases, shows_phases
from callbacks.throughput import TRAIN, find_throughput
from gpt2lab import metric_names
from gpt2lab.data.batch import Batch
from gpt2lab.system.terminal import REFRESH, Phase, console, format_time, is_live, show

LINES = 10  # per run, if the output is not a terminal
MEASURED_STEPS = 10  # the time of the run is estimated after so many
LEAST_STEPS = 3  # measured steps before the first ETA: single ones differ severalfold


class ProgressBar(lightning.Callback, ShowsPhases):
    """Progress bars of training and validation, or lines, printed by rank 0 only."""

    def __init__(self) -> None:
        self._training: Phase | None = None
        self._validation: Phase | None = None
        self._started = 0.0
        self._first_step = 0
        self._shown_step = 0
        self._drawn = 0.0
        self._is_measured = False
        self._trained = 0.0  # seconds until the measured steps

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self._started, self._first_step = time.monotonic(), trainer.global_step
        self._shown_step = trainer.global_step
        if shows_phases(trainer):
            self._training = Phase("train", trainer.max_steps, prints_lines=False, has_rate=False)
            self._training.done = self._training.begun_at = trainer.global_step
            self._training.__enter__()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: lightning.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Show the previous step, which is logged and validated only now."""
        if trainer.global_step > self._shown_step:
            self._show(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        if self._training is not None:
            self._validation = Phase("validate", trainer.num_val_batches[0])
            self._validation.__enter__()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._validation is not None:
            self._validation.advance()

    def on_validation_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        if self._validation is not None:
            self._validation.__exit__()
            self._validation = None

    def on_train_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.global_step > self._shown_step:
            self._show(trainer)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: lightning.LightningModule, exception: BaseException) -> None:
        self._close()

    def _show(self, trainer: Trainer) -> None:
        """Show the newest step. The first one is not measured: it compiles, and loads libraries."""
        step, total = trainer.global_step, trainer.max_steps
        self._shown_step = step
        if self._training is None:
            return
        self._training.done = step
        if not self._is_measured and step < total:
            self._is_measured = True
            throughput = find_throughput(trainer)
            self._started, self._first_step = time.monotonic(), step
            self._trained = throughput.seconds_so_far(TRAIN) if throughput is not None else 0.0
            return
        if step == self._first_step + MEASURED_STEPS and total - step > MEASURED_STEPS:
            show(f"About {self._left(trainer)} left, at the speed of the first {MEASURED_STEPS} steps.")
        if time.monotonic() - self._drawn > REFRESH or step == total:
            self._training.numbers, self._training.remaining = _numbers(trainer), self._remaining(trainer)
            self._training.refresh(at_once=True)
            self._drawn = time.monotonic()
        is_due = step % max(total // LINES, trainer.log_every_n_steps) == 0 or step == total
        if is_due and not is_live(console().file):
            left = self._left(trainer)
            show("  ".join([f"step {step}/{total}", *_numbers(trainer), *([f"ETA {left}"] if left else [])]))

    def _remaining(self, trainer: Trainer) -> float | None:
        """Estimate the remaining seconds; None before enough steps are measured."""
        step = trainer.global_step
        if step < min(self._first_step + LEAST_STEPS, trainer.max_steps):
            return None
        return remaining_seconds(trainer, self._first_step, time.monotonic() - self._started, self._trained)

    def _left(self, trainer: Trainer) -> str:
        """Format the remaining time; empty while it is unknown."""
        left = self._remaining(trainer)
        return "" if left is None else format_time(left)

    def _close(self) -> None:
        for phase in (self._validation, self._training):
            if phase is not None:
                phase.__exit__()
        self._training = self._validation = None


def _numbers(trainer: Trainer) -> list[str]:
    """Format the newest logged values."""
    logged = trainer.callback_metrics
    shown = (
        (metric_names.TRAIN_LOSS, "loss {:.3f}"),
        (metric_names.VAL_LOSS, "val {:.3f}"),
        (metric_names.TOKENS_PER_SECOND, "{:,.0f} tok/s"),
    )
    return [form.format(float(logged[name])) for name, form in shown if name in logged]
