"""StepTimes: a callback that measures where a training step's time goes; profile_step.py adds it to a run."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor

from gpt2lab.system.device import synchronize

SETTLE_STEPS = 10  # left out: first touches of memory, compilation
PHASES = ("forward", "backward", "optimizer")
DATA = "data"


class FetchClock(PassThroughProfiler):
    """Lightning tells it when it begins and ends to wait for the next training batch.

    Args:
        waited: is called with the seconds.
    """

    def __init__(self, waited: Callable[[float], None]) -> None:
        super().__init__()
        self._waited = waited
        self._since = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith(".train_dataloader_next"):
            self._since = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(".train_dataloader_next"):
            self._waited(time.perf_counter() - self._since)


class StepTimes(Callback):
    """Writes <run_dir>/step_times.json: median milliseconds of a whole step and of its phases, on the first rank.

    A step reaches from the end of one optimizer step to the end of the next; forward, backward and optimizer (clipping
    included) are what the mathematics needs, the rest is data, logging, callbacks and the framework. `data` is the wait
    for the next batch, which is the loading itself where no worker processes do it. Steps in which a validation, a
    checkpoint or samples fall are outliers that the median passes over.
    """

    def __init__(self, run_dir: str) -> None:
        self.file = Path(run_dir) / "step_times.json"
        self.steps: list[dict[str, float]] = []
        self.current = dict.fromkeys((*PHASES, DATA), 0.0)
        self.marks: dict[str, float] = {}
        self.step_ended = 0.0

    def setup(self, trainer: lightning.Trainer, module: Any, stage: str) -> None:
        trainer.profiler = FetchClock(self._waited_for_data)

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        trainer.optimizers[0].register_step_post_hook(self._optimizer_stepped)

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self._mark("forward")

    def on_before_backward(self, trainer: lightning.Trainer, module: Any, loss: Tensor) -> None:
        self._add("forward")
        self._mark("backward")

    def on_after_backward(self, trainer: lightning.Trainer, module: Any) -> None:
        self._add("backward")

    def on_before_optimizer_step(self, trainer: lightning.Trainer, module: Any, optimizer: Any) -> None:
        self._mark("optimizer")

    def _optimizer_stepped(self, *_unused: Any) -> None:
        """PyTorch calls this when the optimizer's own step is over, before any callback's work on the step."""
        self._add("optimizer")
        now = self._now()
        if self.step_ended:
            self.steps.append({**self.current, "step": now - self.step_ended})
        self.current = dict.fromkeys((*PHASES, DATA), 0.0)
        self.step_ended = now

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        settled = self.steps[SETTLE_STEPS:]
        if not settled or not trainer.is_global_zero:
            return
        names = (*PHASES, DATA, "step")
        medians = {name: statistics.median(step[name] for step in settled) * 1e3 for name in names}
        outside = statistics.median(1 - sum(step[name] for name in PHASES) / step["step"] for step in settled)
        self.file.write_text(json.dumps({**medians, "outside_share": outside, "steps": len(settled)}) + "\n")

    def _waited_for_data(self, seconds: float) -> None:
        self.current[DATA] += seconds

    def _now(self) -> float:
        synchronize(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return time.perf_counter()

    def _mark(self, phase: str) -> None:
        self.marks[phase] = self._now()

    def _add(self, phase: str) -> None:
        self.current[phase] += self._now() - self.marks.pop(phase)
