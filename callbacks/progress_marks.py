"""Progress marks: report this rank's current activity to its heartbeat, so that late ranks can be identified."""

from typing import Any

import lightning
from lightning import Trainer

from gpt2lab.data.batch import Batch
from gpt2lab.system.heartbeat import Heartbeat


class ProgressMarks(lightning.Callback):
    """Mark the start and the end of every micro-batch, validation batch and save.

    Args:
        heartbeat: heartbeat of this rank.
    """

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self._mark_between_steps(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: lightning.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.heartbeat.mark(f"in step {trainer.global_step + 1}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._mark_between_steps(trainer)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: lightning.LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.heartbeat.mark(f"validating after step {trainer.global_step}, in batch {batch_idx + 1}")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.heartbeat.mark(f"saving after step {trainer.global_step}")

    def _mark_between_steps(self, trainer: Trainer) -> None:
        self.heartbeat.mark(f"between steps {trainer.global_step} and {trainer.global_step + 1}")
