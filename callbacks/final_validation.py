"""FinalValidation: validate after the last step, even if `validate_every` does not divide the number of steps."""

from typing import Any

import lightning
from lightning import Trainer

from gpt2lab.data.batch import Batch


class FinalValidation(lightning.Callback):
    """Request a validation at the last step; placed before Checkpoint, which saves after it."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # Lightning then validates and logs the step
