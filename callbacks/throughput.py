"""Throughput: tokens per second, model FLOP utilisation and peak memory, once per log interval."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning import Trainer

from gpt2lab import metric_names
from gpt2lab.data.batch import Batch
from gpt2lab.storage.prepared_cache import cache_folder
from gpt2lab.system import device

MATMUL_DTYPES = {
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
}


class Throughput(lightning.Callback):
    """Measure target tokens per second of training, including waiting for data, without validation, samples and saves.

    MFU is the trained model's FLOP, 6 N + 12 · L · D · T per token with N without position embeddings, over the peak of
    all devices. Placed first, so that the time of other callbacks after a step is excluded.

    Args:
        cache_dir: folder that stores the measured peak of a CPU; None: the default.
    """

    def __init__(self, cache_dir: str | None = None) -> None:
        self.cache_dir = cache_dir
        self._tokens = 0
        self._seconds = 0.0
        self._since = 0.0
        self._peak = 0.0
        self._device = torch.device("cpu")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block from training time."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self._device = pl_module.device
        dtype = MATMUL_DTYPES.get(str(trainer.precision), torch.float32)
        self._peak = device.peak_flops(self._device, dtype, cache_folder(self.cache_dir)) * trainer.world_size
        shape, whole = pl_module.backbone.shape, sum(weight.numel() for weight in pl_module.backbone.parameters())
        self._parameters = whole - shape.n_positions * shape.n_embd  # position embeddings are added, not multiplied
        self._start()

    def on_validation_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self._start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._tokens += pl_module.step_targets
        if trainer.global_step % trainer.log_every_n_steps:
            return
        self._stop()
        speed = self._tokens / self._seconds
        shape = pl_module.backbone.shape
        per_token = device.flops_per_token(self._parameters, shape.n_layer, shape.n_embd, batch.input_ids.shape[1])
        metrics = {
            metric_names.TOKENS_PER_SECOND: speed,
            metric_names.MFU: speed * per_token / self._peak,
            metric_names.MEMORY_GB: device.peak_memory_bytes(self._device) / 1e9,
        }
        pl_module.log_measured("speed", trainer.global_step, metrics)
        self._tokens, self._seconds = 0, 0.0
        self._start()

    def _start(self) -> None:
        self._since = time.perf_counter()

    def _stop(self) -> None:
        device.synchronize(self._device)
        self._seconds += time.perf_counter() - self._since


@contextmanager
def outside_training_time(trainer: Trainer) -> Iterator[None]:
    """Exclude the block from the tokens per second, if the run measures them."""
    for callback in trainer.callbacks:
        if isinstance(callback, Throughput):
            with callback.paused():
                yield
            return
    yield
