"""CountMatrices: a callback of a run in its own processes that counts the matrices which each rank orthogonalizes."""

import json
from pathlib import Path

import lightning
from torch import Tensor

from gpt2lab.optim import newton_schulz


class CountMatrices(lightning.Callback):
    """Write <run_dir>/matrices-RANK.json at the end of the training: a number."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.matrices, original = 0, newton_schulz.orthogonalize

        def counting(matrices: Tensor) -> Tensor:
            self.matrices += len(matrices)
            return original(matrices)

        newton_schulz.orthogonalize = counting

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        file = Path(trainer.default_root_dir, f"matrices-{trainer.global_rank}.json")
        file.write_text(json.dumps(self.matrices))
