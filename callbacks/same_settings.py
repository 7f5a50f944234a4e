"""Same settings: ranks that were given different settings end the run before its first step."""

import lightning
from lightning import Trainer


class SameSettings(lightning.Callback):
    """Compares a hash of the settings with rank 0's; on one rank there is nothing to compare.

    Args:
        settings_hash: of everything that this rank was given.
    """

    def __init__(self, settings_hash: str) -> None:
        self.settings_hash = settings_hash

    def setup(self, trainer: Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        first = trainer.strategy.broadcast(self.settings_hash, src=0)
        if first != self.settings_hash:
            raise RuntimeError(
                f"rank {trainer.global_rank} was given other settings than rank 0: "
                f"their hash is {self.settings_hash}, rank 0's {first}"
            )
