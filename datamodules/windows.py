"""Windows as micro-batches: the endless training stream of one rank, and a split in file order.

Shapes: B windows of one micro-batch, T positions each.
"""

import numpy as np
import torch
from torch.utils.data import Dataset

from gpt2lab.batch import IGNORE_INDEX, Batch
from gpt2lab.order import micro_batch_rows, step_samples
from gpt2lab.token_file import TokenFile

ENDLESS = 2**62


class TrainingWindows(Dataset[Batch]):
    """This rank's micro-batches from `first_step` on; item number = (step − first_step) · accumulate + part."""

    def __init__(
        self, file: TokenFile, batch: int, accumulate: int, seed: int, rank: int, world: int, first_step: int
    ) -> None:
        self.file = file
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
        samples = step_samples(self.first_step + step, self.batch, self.file.windows, self.seed)
        rows = micro_batch_rows(samples, part * self.world + self.rank, self.accumulate * self.world)
        input_ids, labels = self.file.read(rows)  # (B, T) each
        return Batch(input_ids, labels, self.file.count_targets(samples), torch.from_numpy(rows))


class WindowsInOrder(Dataset[Batch]):
    """Every window of a file once, in batches; rank r takes batches r, r + world, …

    All ranks get equally many, because sharded models run forward together: where the batches do not come out even, the
    last ranks end with one without targets (labels ignored, target_tokens 0, no index).
    """

    def __init__(self, file: TokenFile, batch: int, rank: int, world: int) -> None:
        self.file = file
        self.batch = batch
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        return -(-self.file.windows // (self.batch * self.world))

    def __getitem__(self, number: int) -> Batch:
        if number >= len(self):
            raise IndexError(number)
        first = (self.rank + number * self.world) * self.batch
        rows = np.arange(first, min(first + self.batch, self.file.windows), dtype=np.int64)
        if len(rows) == 0:
            input_ids, labels = self.file.read(np.zeros(1, dtype=np.int64))  # (1, T) each
            return Batch(input_ids, torch.full_like(labels, IGNORE_INDEX), 0, torch.empty(0, dtype=torch.int64))
        input_ids, labels = self.file.read(rows)  # (B, T) each
        return Batch(input_ids, labels, self.file.count_targets(rows), torch.from_numpy(rows))
