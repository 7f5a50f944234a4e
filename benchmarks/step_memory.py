"""StepMemory: callback that measures the memory of training steps; benchmark_distill.py adds it to a run."""

import json
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from benchmarks.resident_memory import forget_peak, peak_resident_bytes


class StepMemory(Callback):
    """Write <run_dir>/step_memory.json: resident bytes before the model is built, and their peak over the steps.

    Callbacks are built after imports and data preparation, before the model. The last step is excluded, because it
    includes validation, samples and the checkpoint.
    """

    def __init__(self, run_dir: str) -> None:
        self.file = Path(run_dir) / "step_memory.json"
        self.before = forget_peak()
        self.peak = 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step < trainer.max_steps:
            self.peak = peak_resident_bytes()

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self.file.write_text(json.dumps({"before_model": self.before, "peak": self.peak}) + "\n")
