"""FinalValidation: validates after the last step also where `validate_every` does not divide the number of steps."""

from typing import Any

import lightning
from lightning import Trainer

from gpt2lab.data.batch import Batch


class FinalValidation(lightning.Callback):
    """Stands before the checkpoint, which saves after the validation of its step."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # Lightning validates, and logs the step, when it is asked to stop
