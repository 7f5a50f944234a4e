"""Pairs as micro-batches: labels on the response only, padded to the longest pair of the batch.

Shapes: B pairs of a micro-batch; T the length of its longest, rounded up to a multiple of 8.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gpt2lab.batch import IGNORE_INDEX, Batch
from gpt2lab.pair_file import PairFile

MULTIPLE = 8  # tensor cores like it, and fewer lengths compile to fewer kernels


def collate_pairs(pairs: PairFile, rows: NDArray[np.int64], target_tokens: int, context: int, pad_id: int) -> Batch:
    """The pairs `rows` as one micro-batch, with labels on their responses only."""
    sequences = [pairs.sequence(row) for row in rows.tolist()]
    longest = max(len(ids) - 1 for ids, _ in sequences)
    length = min(-(-longest // MULTIPLE) * MULTIPLE, context)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)  # (B, T)
    labels = torch.full((len(rows), length), IGNORE_INDEX, dtype=torch.int64)  # (B, T)
    for place, (ids, prompt_length) in enumerate(sequences):
        tokens = torch.from_numpy(ids)
        input_ids[place, : len(ids) - 1] = tokens[:-1]
        labels[place, prompt_length - 1 : len(ids) - 1] = tokens[prompt_length:]
    prompt_lengths = torch.tensor([prompt_length for _, prompt_length in sequences])  # (B,)
    return Batch(input_ids, labels, target_tokens, torch.from_numpy(rows), prompt_lengths)


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
        batch = collate_pairs(self.file, rows, target_tokens, self.context, self.pad_id)
        if self.with_references:
            batch.references = self.file.references(rows)
        return batch
