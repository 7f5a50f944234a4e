"""Document groups: the document of each scored target, so that standard errors are computed between documents.

Shapes: N tokens of a file, B windows of T positions, n targets of a batch in row-major order, G groups.

Losses within a document are strongly correlated, so the units of a standard error are documents, not tokens or windows.
A window may contain several documents. Above MOST_GROUPS documents, neighbouring ones share a group: sums over groups
stay small and the error stays valid.
"""

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt2lab.storage.damaged_files import warn_once
from gpt2lab.system.device import widest_float

MOST_GROUPS = 1000
FEWEST_GROUPS = 20  # with fewer the standard error is too uncertain
LARGEST_SHARE = 0.5  # with a larger share of the targets in one group it is, too
STRETCHES = 20  # groups of a text without document boundaries
SCANNED_AT_A_TIME = 2**24  # tokens
DOCUMENT_NATS, DOCUMENT_TARGETS = "document_nats", "document_targets"  # names of sums (MOST_GROUPS,)


class WindowDocuments:
    """Document groups of the targets in windows of a token file; documents are separated by end-of-text.

    The end-of-text token belongs to the document that it ends, so it may come before or after each document. A file
    with fewer than two documents is split into STRETCHES parts of equal length.

    Args:
        tokens: (N,) tokens of the file.
        end_of_text: separating token.
        name: name of the text, for the warning.
    """

    def __init__(self, tokens: NDArray[np.unsignedinteger], end_of_text: int, name: str) -> None:
        self.tokens = tokens
        self.end_of_text = end_of_text
        self.name = name

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Positions of end-of-text in the file; warn if they do not separate two documents."""
        starts = range(0, len(self.tokens), SCANNED_AT_A_TIME)
        parts = [
            start + np.flatnonzero(self.tokens[start : start + SCANNED_AT_A_TIME] == self.end_of_text)
            for start in starts
        ]
        ends = np.concatenate([np.empty(0, np.int64), *parts])
        if self._documents(ends) < 2:
            warn_once(
                f"{self.name}: fewer than two documents, no end-of-text token ({self.end_of_text}) separates any. "
                f"Standard errors are computed between {STRETCHES} stretches of the text and may be too small."
            )
        return ends

    def _documents(self, ends: NDArray[np.int64]) -> int:
        """Number of documents with targets, which are tokens 1 to N − 1."""
        return int((ends < len(self.tokens) - 1).sum() - (ends < 1).sum()) + 1

    def target_groups(self, starts: NDArray[np.int64], inputs: Tensor, kept: Tensor, at_input: bool = False) -> Tensor:
        """Return the groups of the kept positions, (n,) int64 below MOST_GROUPS.

        Args:
            starts: (B,) position of each window's first token in the file.
            inputs: (B, T) tokens of the windows as arranged by the objective.
            kept: (B, T) bool, positions with a target.
            at_input: whether a label is the token at its position (mlm) instead of the next one.
        """
        ends, (_, length) = self._ends, inputs.shape
        count = self._documents(ends)
        if count < 2:
            positions = torch.from_numpy(starts)[:, None] + torch.arange(length)
            return (positions[kept] * STRETCHES // max(len(self.tokens), 1)).clamp_max(STRETCHES - 1)
        is_end = inputs == self.end_of_text
        before = torch.from_numpy(np.searchsorted(ends, starts) - np.searchsorted(ends, 1))  # (B,)
        documents = before[:, None] + is_end.cumsum(1) - (is_end.long() if at_input else 0)
        return merge_groups(documents[kept].clamp(0, count - 1), count)


def merge_groups(documents: Tensor, count: int) -> Tensor:
    """Map document numbers below `count` to groups below MOST_GROUPS, merging neighbours if necessary."""
    return documents if count <= MOST_GROUPS else documents * MOST_GROUPS // count


def document_sums(nats: Tensor, documents: Tensor) -> dict[str, Tensor]:
    """Return loss sums and target counts (MOST_GROUPS,) by group; they are additive over batches and ranks.

    Args:
        nats, documents: (n,).
    """
    nats, documents = nats.to(widest_float(nats.device)), documents.to(nats.device)
    zeros = torch.zeros(MOST_GROUPS, dtype=nats.dtype, device=nats.device)
    return {
        DOCUMENT_NATS: zeros.index_add(0, documents, nats),
        DOCUMENT_TARGETS: zeros.index_add(0, documents, torch.ones_like(nats)),
    }


def warn_of_few_groups(targets: Tensor) -> None:
    """Warn if a standard error comes from fewer than FEWEST_GROUPS documents or is dominated by one.

    Args:
        targets: (G,) number of targets of each group that has any.
    """
    groups = len(targets)
    largest = (targets.max() / targets.sum()).item() if groups > 1 else 0.0
    if 1 < groups < FEWEST_GROUPS:
        warn_once(
            f"The standard errors come from {groups} documents, fewer than {FEWEST_GROUPS}: they are rough. "
            "Raise validate_tokens, or validate on more documents."
        )
    elif largest > LARGEST_SHARE:
        warn_once(
            f"One of {groups} document groups has {largest:.0%} of the targets: the standard errors are rough. "
            "Raise validate_tokens, or validate on more documents of its length."
        )
