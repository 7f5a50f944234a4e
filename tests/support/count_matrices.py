"""Count the matrices that Muon orthogonalizes: in a block, or in a run in its own processes by a callback."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import lightning
from torch import Tensor

from gpt2lab.optim import newton_schulz


@contextmanager
def counted_matrices() -> Iterator[Counter[str]]:
    """Count, by shape, the matrices that this process orthogonalizes in the block."""
    counted: Counter[str] = Counter()
    original = newton_schulz.orthogonalize

    def counting(matrices: Tensor) -> Tensor:
        counted["×".join(map(str, matrices.shape[1:]))] += len(matrices)
        return original(matrices)

    newton_schulz.orthogonalize = counting
    try:
        yield counted
    finally:
        newton_schulz.orthogonalize = original


class CountMatrices(lightning.Callback):
    """Write <run_dir>/matrices-RANK.json at the end of the training: a number."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.block = ExitStack()
        self.counted = self.block.enter_context(counted_matrices())

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.block.close()
        file = Path(trainer.default_root_dir, f"matrices-{trainer.global_rank}.json")
        file.write_text(json.dumps(self.counted.total()))
