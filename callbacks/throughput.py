"""Throughput: tokens per second, model FLOP utilisation, peak memory, and the time of each phase of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning
import torch
from lightning import Trainer

from callbacks.shown_phases import shown_phase
from gpt2lab import metric_names
from gpt2lab.data.batch import Batch
from gpt2lab.storage.prepared_cache import cache_folder
from gpt2lab.system import device
from gpt2lab.system.terminal import Phase

MATMUL_DTYPES = {
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
}
PREPARE, TRAIN, VALIDATE, SAMPLE, SAVE, EXPORT = "prepare", "train", "validate", "sample", "save", "export"
BENCHMARK = "benchmark"
PHASES = (PREPARE, TRAIN, VALIDATE, SAMPLE, BENCHMARK, SAVE, EXPORT)


class Throughput(lightning.Callback):
    """Measure target tokens per second of training, including waiting for data, without validation, samples and saves.

    Each moment belongs to one phase: `prepare` until the first step, then `train` except for what the callbacks do in
    other phases (`during`), and `save` after the last step.

    MFU is the trained model's FLOP, 6 N + 12 · L · D · T per token with N without position embeddings, over the peak of
    all devices. Placed first, so that the time of other callbacks after a step is excluded.

    Args:
        cache_dir: folder that stores the measured peak of a CPU; None: the default.

    Attributes:
        seconds: seconds of each phase since the run was started or resumed.
        entered: how often each of the other phases than `train` was entered.
    """

    def __init__(self, cache_dir: str | None = None) -> None:
        self.cache_dir = cache_dir
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.entered = dict.fromkeys(PHASES, 0)
        self._earlier = dict.fromkeys(PHASES, 0.0)  # of the run before it was resumed
        self._phase, self._since = PREPARE, time.perf_counter()
        self._left = PREPARE  # phase before a validation
        self._tokens = 0
        self._trained = 0.0  # seconds of training before this log interval
        self._peak = 0.0
        self._device = torch.device("cpu")

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count the block's time in a phase."""
        self.entered[phase] += 1
        before = self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def seconds_by_phase(self) -> dict[str, float]:
        """Return the seconds of each phase until now, including those before the run was resumed."""
        self._enter(self._phase)
        return {phase: self._earlier[phase] + self.seconds[phase] for phase in PHASES}

    def seconds_so_far(self, phase: str) -> float:
        """Return the seconds of a phase since the run was started or resumed, without a wait for a GPU's queue."""
        return self.seconds[phase] + (time.perf_counter() - self._since if phase == self._phase else 0.0)

    def mean(self, phase: str) -> float | None:
        """Return the mean seconds of a phase each time it was entered; None if it was not."""
        return self.seconds[phase] / self.entered[phase] if self.entered[phase] else None

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds_by_phase()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier |= state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self._device = pl_module.device
        dtype = MATMUL_DTYPES.get(str(trainer.precision), torch.float32)
        self._peak = device.peak_flops(self._device, dtype, cache_folder(self.cache_dir)) * trainer.world_size
        shape, whole = pl_module.backbone.shape, sum(weight.numel() for weight in pl_module.backbone.parameters())
        self._parameters = whole - shape.n_positions * shape.n_embd  # position embeddings are added, not multiplied

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: lightning.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self._phase != TRAIN:
            self._enter(TRAIN)

    def on_validation_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self.entered[VALIDATE] += 1
        self._left = self._enter(VALIDATE)

    def on_validation_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self._enter(self._left)

    def on_train_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self._enter(SAVE)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._tokens += pl_module.step_targets
        if trainer.global_step % trainer.log_every_n_steps:
            return
        self._enter(TRAIN)
        speed = self._tokens / (self.seconds[TRAIN] - self._trained)
        shape = pl_module.backbone.shape
        per_token = device.flops_per_token(self._parameters, shape.n_layer, shape.n_embd, batch.input_ids.shape[1])
        metrics = {
            metric_names.TOKENS_PER_SECOND: speed,
            metric_names.MFU: speed * per_token / self._peak,
            metric_names.MEMORY_GB: device.peak_memory_bytes(self._device) / 1e9,
        }
        pl_module.log_measured("speed", trainer.global_step, metrics)
        self._tokens, self._trained = 0, self.seconds[TRAIN]

    def _enter(self, phase: str) -> str:
        """Count the time until now in the present phase, and enter another one; returns the present one."""
        device.synchronize(self._device)
        now, before = time.perf_counter(), self._phase
        self.seconds[before] += now - self._since
        self._phase, self._since = phase, now
        return before


def find_throughput(trainer: Trainer) -> Throughput | None:
    """Return the callback that measures the phases, if the run has it."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, Throughput)), None)


@contextmanager
def outside_training_time(trainer: Trainer, phase: str, title: str = "", total: int | None = None) -> Iterator[Phase]:
    """Show a phase, and count the block's time in it, if the run measures them.

    Args:
        title: name on the terminal; that of the phase by default.
        total: amount of work; None: unknown.
    """
    throughput = find_throughput(trainer)
    with (
        shown_phase(trainer, title or phase, total) as shown,
        throughput.during(phase) if throughput is not None else nullcontext(),
    ):
        yield shown
