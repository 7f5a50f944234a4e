"""Token file: one split's tokens in one flat file, read through a memory map as fixed windows.

    train.bin, val.bin    little-endian uint16, or uint32 if V > 65,536; end-of-text before each document

Window i of context T consists of tokens [i·T, i·T + T]. Windows have stride T and their targets do not overlap, so a
window's content does not depend on order, batch size or epoch.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt2lab.data.batch import IGNORE_INDEX, Batch


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest dtype for all token ids."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def map_file(path: Path, dtype: str | np.dtype) -> np.ndarray:
    """Map a file into memory; an empty file, which cannot be mapped, becomes an empty array."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


class TokenFile:
    """Windows of a flat file of token ids.

    Args:
        path: the file.
        dtype: dtype of a token.
        context: T, targets of a window.
        keep_short: whether to keep the last, shorter window (validation: every token but the first is a target).
    """

    def __init__(self, path: Path, dtype: np.dtype, context: int, *, keep_short: bool = False) -> None:
        self.tokens = map_file(path, dtype)
        self.context = context
        targets = max(len(self.tokens) - 1, 0)
        self.windows = -(-targets // context) if keep_short else targets // context
        self.targets = targets if keep_short else self.windows * context

    def read(self, windows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return (input_ids, labels), (B, T) int64 each, of the windows (B,); labels after the end are ignored."""
        positions = windows[:, None] * self.context + np.arange(self.context + 1)  # (B, T + 1)
        last = len(self.tokens) - 1
        tokens = torch.from_numpy(self.tokens[np.minimum(positions, last)].astype(np.int64))  # (B, T + 1)
        labels = tokens[:, 1:].clone()
        labels[torch.from_numpy(positions[:, 1:] > last)] = IGNORE_INDEX
        return tokens[:, :-1].contiguous(), labels

    def __len__(self) -> int:
        return self.windows

    def batch(self, rows: NDArray[np.int64], target_tokens: int) -> Batch:
        """Return the windows `rows` (B,) as a micro-batch of a step with `target_tokens` targets in total."""
        input_ids, labels = self.read(rows)
        return Batch(input_ids, labels, target_tokens, torch.from_numpy(rows))

    def target_counts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of targets in each of the windows `rows` (B,)."""
        return np.clip(len(self.tokens) - 1 - rows * self.context, 0, self.context)
