"""Pairs as micro-batches: labels on the response only, padded to the longest pair of the batch."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gpt2lab.batch import Batch, pad_pairs
from gpt2lab.pair_file import PairFile


@dataclass(frozen=True)
class PairsToPad:
    """One side of the split, and how its batches are padded."""

    file: PairFile
    context: int
    pad_id: int
    with_references: bool

    def __len__(self) -> int:
        return len(self.file)

    def target_counts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.file.target_counts(rows)

    def batch(self, rows: NDArray[np.int64], target_tokens: int) -> Batch:
        sequences = [self.file.sequence(row) for row in rows.tolist()]
        batch = pad_pairs(
            [(torch.from_numpy(tokens), prompt_length) for tokens, prompt_length in sequences],
            torch.from_numpy(rows),
            target_tokens=target_tokens,
            context=self.context,
            pad_id=self.pad_id,
        )
        if self.with_references:
            batch.references = self.file.references(rows)
        return batch
