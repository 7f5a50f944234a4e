"""StepMemory: callback that measures the memory of training steps; benchmark_distill.py adds it to a run."""

import json
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from gpt2lab.system.device import peak_memory_bytes, reset_peak_memory

CPU = torch.device("cpu")


class StepMemory(Callback):
    """Write <run_dir>/step_memory.json: resident bytes before the model is built, and their peak over the steps.

    Callbacks are built after imports and data preparation, before the model. The last step is excluded, because it
    includes validation, samples and the checkpoint.
    """

    def __init__(self, run_dir: str) -> None:
        self.file = Path(run_dir) / "step_memory.json"
        self.before = reset_peak_memory(CPU)
        self.peak = 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step < trainer.max_steps:
            self.peak = peak_memory_bytes(CPU)

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self.file.write_text(json.dumps({"before_model": self.before, "peak": self.peak}) + "\n")
