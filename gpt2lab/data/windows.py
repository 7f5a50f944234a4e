"""Windows: one side of a tokenized corpus as samples of an objective."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.data.data_order import validation_rows
from gpt2lab.data.document_groups import WindowDocuments
from gpt2lab.data.objectives import Objective
from gpt2lab.data.token_file import TokenFile


@dataclass(frozen=True)
class Windows:
    """Windows of a token file, converted by an objective; without `keys` a window's random key is its number.

    Attributes:
        documents: document groups of the file; batches without `keys` (validation) then contain those of their targets.
    """

    file: TokenFile
    objective: Objective
    documents: WindowDocuments | None = None

    def __len__(self) -> int:
        return len(self.file)

    def numbered_tokens(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (number, tokens) of each of the S windows, (S,) both."""
        numbers = np.arange(len(self), dtype=np.int64)
        return numbers, self.file.target_counts(numbers)

    def target_counts(self, rows: NDArray[np.int64], keys: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Number of targets in each of the windows `rows` (B,)."""
        counts = self.file.target_counts(rows)
        return self.objective.target_counts(counts, self.file.context, rows if keys is None else keys)

    def batch(self, rows: NDArray[np.int64], target_tokens: int, keys: NDArray[np.int64] | None = None) -> Batch:
        """Return the windows `rows` (B,) as a micro-batch of a step with `target_tokens` targets in total."""
        plain = self.file.batch(rows, target_tokens)
        batch = self.objective(plain, rows if keys is None else keys)
        if self.documents is None or keys is not None:
            return batch
        is_masked, kept = self.objective.settings.kind.fills_masks, batch.labels != IGNORE_INDEX
        inputs = plain.input_ids if is_masked else batch.input_ids
        groups = self.documents.target_groups(rows * self.file.context, inputs, kept, at_input=is_masked)
        return replace(batch, documents=groups)


class SlidingWindows(Dataset[Batch]):
    """Batches of overlapping windows: every token but the first is a target once, with a long context.

    The first window scores all its targets, each later one its last `stride`, or the rest of the text.

    Args:
        tokens: (N,) tokens of a text.
        context: T, tokens of a window; except in the first window, a target has at least T − stride + 1 tokens before.
        stride: 1 to T.
        batch: windows per batch.
        documents: document groups of the text; batches then contain those of their targets.
        limit: most targets, in a fixed sample of the windows; None: all.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        context: int,
        stride: int,
        batch: int,
        documents: WindowDocuments | None = None,
        limit: int | None = None,
    ) -> None:
        self.tokens, self.stride, self.batch, self.documents = tokens, stride, batch, documents
        self.context = min(context, len(tokens) - 1)
        numbers = np.arange(1 + -(-(len(tokens) - 1 - self.context) // stride), dtype=np.int64)
        self.windows = validation_rows(numbers, self.context - self._scored_before(numbers), limit)

    def __len__(self) -> int:
        return -(-len(self.windows) // self.batch)

    def __getitem__(self, number: int) -> Batch:
        if number >= len(self):
            raise IndexError(number)
        rows = self.windows[number * self.batch : (number + 1) * self.batch]
        starts = self._starts(rows)
        read = self.tokens[starts[:, None] + np.arange(self.context + 1)].astype(np.int64)  # (B, T + 1)
        labels = torch.from_numpy(read[:, 1:].copy())
        labels[torch.from_numpy(np.arange(self.context) < self._scored_before(rows)[:, None])] = IGNORE_INDEX
        input_ids, kept = torch.from_numpy(read[:, :-1].copy()), labels != IGNORE_INDEX
        groups = self.documents.target_groups(starts, input_ids, kept) if self.documents is not None else None
        return Batch(input_ids, labels, int(kept.sum()), torch.from_numpy(rows), documents=groups)

    def _starts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Position of each window's first token; the last window ends with the text."""
        return np.minimum(rows * self.stride, len(self.tokens) - 1 - self.context)

    def _scored_before(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of each window's first targets that earlier windows score."""
        return np.where(rows == 0, 0, self._starts(rows - 1) + self.context - self._starts(rows))
