"""Same settings: fail before the first step if ranks have different settings."""

import lightning
from lightning import Trainer


class SameSettings(lightning.Callback):
    """Compare a hash of the settings with that of rank 0.

    Args:
        settings_hash: hash of this rank's settings.
    """

    def __init__(self, settings_hash: str) -> None:
        self.settings_hash = settings_hash

    def setup(self, trainer: Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        first = trainer.strategy.broadcast(self.settings_hash, src=0)
        if first != self.settings_hash:
            raise RuntimeError(
                f"rank {trainer.global_rank} has other settings than rank 0: "
                f"their hash is {self.settings_hash}, rank 0's {first}"
            )
