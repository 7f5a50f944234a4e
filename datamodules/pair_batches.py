"""Pairs as micro-batches: labels on the response only, padded to the longest row of the batch."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gpt2lab.data.batch import Batch, PairTokens, packed, pad_pairs
from gpt2lab.data.pair_file import PairFile


@dataclass(frozen=True)
class PairsToPad:
    """One side of the split, and how its batches are padded."""

    file: PairFile
    context: int
    pad_id: int
    with_references: bool
    both_ways: bool = False  # whether prompts see themselves both ways
    packing: bool = False  # several pairs in a row

    def __len__(self) -> int:
        return len(self.file)

    def target_counts(self, rows: NDArray[np.int64], draws: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        return self.file.target_counts(rows)

    def batch(self, rows: NDArray[np.int64], target_tokens: int, draws: NDArray[np.int64] | None = None) -> Batch:
        pairs = [self._pair(row) for row in rows.tolist()]
        batch = pad_pairs(
            packed(pairs, self.context) if self.packing else [[pair] for pair in pairs],
            target_tokens=target_tokens,
            context=self.context,
            pad_id=self.pad_id,
            both_ways=self.both_ways,
            packing=self.packing,
        )
        if draws is None:
            batch.documents = self.file.document_groups(batch.indices.numpy())
        if self.with_references:
            batch.references = self.file.references(rows)
        return batch

    def _pair(self, row: int) -> PairTokens:
        tokens, prompt_length = self.file.sequence(row)
        return PairTokens(torch.from_numpy(tokens), prompt_length, row)
