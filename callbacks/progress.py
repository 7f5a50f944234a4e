"""Progress: a bar with loss, tokens per second and ETA on a terminal, otherwise about ten plain lines."""

import time
from typing import Any

import lightning
from lightning import Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from callbacks.remaining_time import remaining_seconds
from callbacks.terminal import console, show
from gpt2lab import metric_names
from gpt2lab.data.batch import Batch

REFRESH = 0.25  # seconds; drawn between steps, not in a thread that would compete with them
LINES = 10  # per run, if the output is not a terminal


class ProgressBar(lightning.Callback):
    """Progress bar or lines, printed by rank 0 only."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._started = 0.0
        self._first_step = 0
        self._shown_step = 0
        self._drawn = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self._started, self._first_step = time.monotonic(), trainer.global_step
        self._shown_step = trainer.global_step
        if not trainer.is_global_zero or not console.is_terminal:
            return
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(None), TextColumn("{task.fields[numbers]}"))
        times = (TimeElapsedColumn(), TextColumn("{task.fields[eta]}"))
        self._bar = Progress(*columns, *times, console=console, auto_refresh=False, expand=True)
        self._task = self._bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, numbers="", eta="")
        self._bar.start()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: lightning.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Show the previous step, which is logged and validated only now."""
        if trainer.is_global_zero and trainer.global_step > self._shown_step:
            self._show(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._bar is not None and time.monotonic() - self._drawn > REFRESH:
            self._bar.update(self._task, numbers=f"validating {batch_idx + 1}/{trainer.num_val_batches[0]}")
            self._bar.refresh()
            self._drawn = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.is_global_zero and trainer.global_step > self._shown_step:
            self._show(trainer)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: lightning.LightningModule, exception: BaseException) -> None:
        self._close()

    def _show(self, trainer: Trainer) -> None:
        step, total = trainer.global_step, trainer.max_steps
        self._shown_step = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
            if time.monotonic() - self._drawn > REFRESH or step == total:
                # Reading both synchronizes the GPU
                self._bar.update(self._task, numbers=_numbers(trainer), eta=self._eta(trainer))
                self._bar.refresh()
                self._drawn = time.monotonic()
        elif step % max(total // LINES, trainer.log_every_n_steps) == 0 or step == total:
            show("  ".join(part for part in (f"step {step}/{total}", _numbers(trainer), self._eta(trainer)) if part))

    def _eta(self, trainer: Trainer) -> str:
        """Format the time until the run has ended."""
        return format_eta(remaining_seconds(trainer, self._first_step, time.monotonic() - self._started))

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def format_eta(seconds: float) -> str:
    """Format a time as minutes and seconds."""
    return "ETA {}:{:02}".format(*divmod(round(seconds), 60))


def _numbers(trainer: Trainer) -> str:
    """Format the newest logged values."""
    logged = trainer.callback_metrics
    shown = (
        (metric_names.TRAIN_LOSS, "loss {:.3f}"),
        (metric_names.VAL_LOSS, "val {:.3f}"),
        (metric_names.TOKENS_PER_SECOND, "{:,.0f} tok/s"),
    )
    return "  ".join(form.format(float(logged[name])) for name, form in shown if name in logged)
