"""Windows: one side of a corpus as the samples that an objective reads."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpt2lab.batch import Batch
from gpt2lab.objectives import Objective
from gpt2lab.token_file import TokenFile


@dataclass(frozen=True)
class Windows:
    """Windows of a token file, read by an objective; a sample's draw number is its own unless another is given."""

    file: TokenFile
    objective: Objective

    def __len__(self) -> int:
        return len(self.file)

    def target_counts(self, rows: NDArray[np.int64], draws: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Number of targets in each of the windows numbered `rows` (B,)."""
        counts = self.file.target_counts(rows)
        return self.objective.target_counts(counts, self.file.context, rows if draws is None else draws)

    def batch(self, rows: NDArray[np.int64], target_tokens: int, draws: NDArray[np.int64] | None = None) -> Batch:
        """The windows numbered `rows` (B,) as a micro-batch of a step with `target_tokens` targets in all."""
        return self.objective(self.file.batch(rows, target_tokens), rows if draws is None else draws)
