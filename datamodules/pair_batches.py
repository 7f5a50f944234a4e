"""Which pairs a step sees, and how they are padded: micro-batches as a pure function of (seed, step, rank).

Shapes: B pairs of a micro-batch; T the length of its longest, rounded up to a multiple of 8.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from gpt2lab.batch import IGNORE_INDEX, Batch
from gpt2lab.order import micro_batch_rows, step_samples
from gpt2lab.pair_file import PairFile

ENDLESS = 2**62
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

    def batch(self, rows: NDArray[np.int64], target_tokens: int) -> Batch:
        return collate_pairs(self.file, rows, target_tokens, self.context, self.pad_id)


class TrainingPairs(Dataset[Batch]):
    """This rank's micro-batches from `first_step` on; item number = (step − first_step) · accumulate + part."""

    def __init__(
        self, pairs: PairsToPad, batch: int, accumulate: int, seed: int, rank: int, world: int, first_step: int
    ) -> None:
        self.pairs = pairs
        self.batch = batch
        self.accumulate = accumulate
        self.seed = seed
        self.rank = rank
        self.world = world
        self.first_step = first_step

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, number: int) -> Batch:
        step, part = divmod(number, self.accumulate)
        samples = step_samples(self.first_step + step, self.batch, len(self.pairs.file), self.seed)
        rows = micro_batch_rows(samples, part * self.world + self.rank, self.accumulate * self.world)
        return self.pairs.batch(rows, self.pairs.file.target_tokens(samples))


class PairsInOrder(Dataset[Batch]):
    """Every pair of a side once, in batches with their references; rank r takes batches r, r + world, …

    All ranks get equally many, because sharded models run forward together: where the batches do not come out even, the
    last ranks end with one without pairs (one row of ignored labels, target_tokens 0, nothing else).
    """

    def __init__(self, pairs: PairsToPad, batch: int, rank: int, world: int) -> None:
        self.pairs = pairs
        self.batch = batch
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        return -(-len(self.pairs.file) // (self.batch * self.world))

    def __getitem__(self, number: int) -> Batch:
        if number >= len(self):
            raise IndexError(number)
        first = (self.rank + number * self.world) * self.batch
        rows = np.arange(first, min(first + self.batch, len(self.pairs.file)), dtype=np.int64)
        if len(rows) == 0:
            filler = self.pairs.batch(np.zeros(1, dtype=np.int64), 0)
            none = torch.empty(0, dtype=torch.int64)
            return Batch(filler.input_ids, torch.full_like(filler.labels, IGNORE_INDEX), 0, none, none, [])
        batch = self.pairs.batch(rows, self.pairs.file.target_tokens(rows))
        batch.references = self.pairs.file.references(rows)
        return batch
