"""Windows: one side of a corpus as the samples that an objective reads."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.data.document_groups import WindowDocuments
from gpt2lab.data.objectives import Objective
from gpt2lab.data.token_file import TokenFile


@dataclass(frozen=True)
class Windows:
    """Windows of a token file, read by an objective; a sample's draw number is its own unless another is given.

    Attributes:
        documents: of the file; batches in file order, without draw numbers, then name each target's document group.
    """

    file: TokenFile
    objective: Objective
    documents: WindowDocuments | None = None

    def __len__(self) -> int:
        return len(self.file)

    def target_counts(self, rows: NDArray[np.int64], draws: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Number of targets in each of the windows numbered `rows` (B,)."""
        counts = self.file.target_counts(rows)
        return self.objective.target_counts(counts, self.file.context, rows if draws is None else draws)

    def batch(self, rows: NDArray[np.int64], target_tokens: int, draws: NDArray[np.int64] | None = None) -> Batch:
        """The windows numbered `rows` (B,) as a micro-batch of a step with `target_tokens` targets in all."""
        plain = self.file.batch(rows, target_tokens)
        batch = self.objective(plain, rows if draws is None else draws)
        if self.documents is None or draws is not None:
            return batch
        is_masked, kept = self.objective.settings.kind.fills_masks, batch.labels != IGNORE_INDEX
        inputs = plain.input_ids if is_masked else batch.input_ids
        groups = self.documents.of_targets(rows * self.file.context, inputs, kept, at_input=is_masked)
        return replace(batch, documents=groups)


class SlidingWindows(Dataset[Batch]):
    """Windows that overlap, in batches: every token but the first is a target once, with a long context before it.

    The first window scores all its targets, each further one its last `stride`, or what is left of the text.

    Args:
        tokens: (N,) of a text.
        context: T, tokens of a window; the least a target sees, but for the first ones, is T − stride + 1.
        stride: 1 to T.
        batch: windows of a batch.
        documents: of the text, so that batches name each target's document group.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        context: int,
        stride: int,
        batch: int,
        documents: WindowDocuments | None = None,
    ) -> None:
        self.tokens, self.stride, self.batch, self.documents = tokens, stride, batch, documents
        self.context = min(context, len(tokens) - 1)
        self.windows = 1 + -(-(len(tokens) - 1 - self.context) // stride)

    def __len__(self) -> int:
        return -(-self.windows // self.batch)

    def __getitem__(self, number: int) -> Batch:
        if number >= len(self):
            raise IndexError(number)
        rows = np.arange(number * self.batch, min((number + 1) * self.batch, self.windows))
        last = len(self.tokens) - 1 - self.context
        starts = np.minimum(rows * self.stride, last)  # (B,) the last window ends where the text does
        read = self.tokens[starts[:, None] + np.arange(self.context + 1)].astype(np.int64)  # (B, T + 1)
        labels = torch.from_numpy(read[:, 1:].copy())
        scored = np.minimum((rows - 1) * self.stride, last) + self.context - starts  # (B,) labels that were scored
        scored[rows == 0] = 0
        labels[torch.from_numpy(np.arange(self.context) < scored[:, None])] = IGNORE_INDEX
        input_ids, kept = torch.from_numpy(read[:, :-1].copy()), labels != IGNORE_INDEX
        groups = self.documents.of_targets(starts, input_ids, kept) if self.documents is not None else None
        return Batch(input_ids, labels, int(kept.sum()), torch.from_numpy(rows), documents=groups)
