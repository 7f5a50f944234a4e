"""StepTimes and StepMemory: callbacks that measure training steps; benchmarks add them to runs of train.py."""

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

from gpt2lab.system.device import peak_memory_bytes, reset_peak_memory, synchronize

WARM_UP_STEPS = 10  # excluded: first use of memory, compilation
PHASES = ("forward", "backward", "optimizer")
DATA = "data"
CPU = torch.device("cpu")


class FetchClock(PassThroughProfiler):
    """Profiler that measures how long Lightning waits for the next training batch.

    Args:
        waited: called with the seconds.
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
    """Write <run_dir>/step_times.json: median milliseconds of a step and of its phases, on rank 0.

    A step is the time between the ends of two optimizer steps. Besides forward, backward and optimizer (with clipping)
    it contains data, logging, callbacks and the framework. `data` is the wait for the next batch, without worker
    processes its loading. Steps with a validation, a checkpoint or samples are outliers, to which the median is robust.
    """

    def __init__(self) -> None:
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
        """Record the end of the optimizer step; PyTorch calls this hook before any callback's work on the step."""
        self._add("optimizer")
        now = self._now()
        if self.step_ended:
            self.steps.append({**self.current, "step": now - self.step_ended})
        self.current = dict.fromkeys((*PHASES, DATA), 0.0)
        self.step_ended = now

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        timed = self.steps[WARM_UP_STEPS:]
        if not timed or not trainer.is_global_zero:
            return
        names = (*PHASES, DATA, "step")
        medians = {name: statistics.median(step[name] for step in timed) * 1e3 for name in names}
        outside = statistics.median(1 - sum(step[name] for name in PHASES) / step["step"] for step in timed)
        found = {**medians, "outside_share": outside, "steps": len(timed)}
        Path(trainer.default_root_dir, "step_times.json").write_text(json.dumps(found) + "\n", encoding="utf-8")

    def _waited_for_data(self, seconds: float) -> None:
        self.current[DATA] += seconds

    def _now(self) -> float:
        synchronize(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return time.perf_counter()

    def _mark(self, phase: str) -> None:
        self.marks[phase] = self._now()

    def _add(self, phase: str) -> None:
        self.current[phase] += self._now() - self.marks.pop(phase)


class StepMemory(Callback):
    """Write <run_dir>/step_memory.json: resident bytes before the model is built, and their peak over the steps.

    Callbacks are built after imports and data preparation, before the model. The last step is excluded, because it
    includes validation, samples and the checkpoint.
    """

    def __init__(self) -> None:
        self.before = reset_peak_memory(CPU)
        self.peak = 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step < trainer.max_steps:
            self.peak = peak_memory_bytes(CPU)

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        found = {"before_model": self.before, "peak": self.peak}
        Path(trainer.default_root_dir, "step_memory.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


class FirstStep(Callback):
    """Write <run_dir>/first_step.json: the time (seconds since 1970) at the end of the first optimizer step."""

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        file = Path(trainer.default_root_dir, "first_step.json")
        if trainer.global_step == 1 and trainer.is_global_zero and not file.exists():
            file.write_text(json.dumps({"time": time.time()}) + "\n", encoding="utf-8")
