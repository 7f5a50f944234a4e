"""Document groups: which document each scored target belongs to, so that errors are computed between documents.

Shapes: N tokens of a file, B windows of T positions, n targets of a batch in row-major order, G groups.

Losses within a document are strongly correlated, so documents are the units of a standard error, not tokens or windows.
A window can hold the ends of several documents; each of its targets belongs to its own. Above MOST_GROUPS documents,
neighbouring ones share a group, which keeps every sum over groups small and the error valid.
"""

import logging
from functools import cache, cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt2lab.system.device import exact_dtype

MOST_GROUPS = 1000
FEWEST_GROUPS = 20  # below it a standard error is itself too uncertain
LARGEST_SHARE = 0.5  # of the targets in one group, likewise
STRETCHES = 20  # groups of a text whose documents are not known
SCANNED_AT_A_TIME = 2**24  # tokens
DOCUMENT_NATS, DOCUMENT_TARGETS = "document_nats", "document_targets"  # names of sums (MOST_GROUPS,)

log = logging.getLogger(__name__)


class WindowDocuments:
    """Groups of the targets in windows of a token file; documents are separated by end-of-text.

    The end-of-text token belongs to the document that it ends, so files that put it before each document and files that
    put it behind are cut alike. A file with fewer than two documents is cut into STRETCHES parts of equal length.

    Args:
        tokens: (N,) of the file.
        end_of_text: the separating token.
        name: of the text, for the warning.
    """

    def __init__(self, tokens: NDArray[np.unsignedinteger], end_of_text: int, name: str) -> None:
        self.tokens = tokens
        self.end_of_text = end_of_text
        self.name = name

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Positions of end-of-text in the file; warns where they do not tell documents apart."""
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
        """How many documents the targets, tokens 1 to N − 1, belong to."""
        return int((ends < len(self.tokens) - 1).sum() - (ends < 1).sum()) + 1

    def of_targets(self, starts: NDArray[np.int64], inputs: Tensor, kept: Tensor, at_input: bool = False) -> Tensor:
        """(n,) int64 groups of the kept positions, below MOST_GROUPS.

        Args:
            starts: (B,) position of each window's first token in the file.
            inputs: (B, T) tokens of the windows as the objective arranged them.
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
        return merged(documents[kept].clamp(0, count - 1), count)


def merged(documents: Tensor, count: int) -> Tensor:
    """Groups below MOST_GROUPS from document numbers below `count`; neighbours are merged where there are more."""
    return documents if count <= MOST_GROUPS else documents * MOST_GROUPS // count


def document_sums(nats: Tensor, documents: Tensor) -> dict[str, Tensor]:
    """Loss sums and target counts (MOST_GROUPS,) by group; they add over batches and ranks.

    Args:
        nats, documents: (n,).
    """
    nats, documents = nats.to(exact_dtype(nats.device)), documents.to(nats.device)
    zeros = torch.zeros(MOST_GROUPS, dtype=nats.dtype, device=nats.device)
    return {
        DOCUMENT_NATS: zeros.index_add(0, documents, nats),
        DOCUMENT_TARGETS: zeros.index_add(0, documents, torch.ones_like(nats)),
    }


def warn_of_few_groups(targets: Tensor) -> None:
    """Warn where fewer than FEWEST_GROUPS documents, or one document above all, determine a standard error.

    Args:
        targets: (G,) of each document group with a target.
    """
    groups = len(targets)
    largest = (targets.max() / targets.sum()).item() if groups > 1 else 0.0
    if 1 < groups < FEWEST_GROUPS:
        warn_once(
            f"The standard errors rest on {groups} documents, fewer than {FEWEST_GROUPS}: they are rough. "
            "Validate on more documents."
        )
    elif largest > LARGEST_SHARE:
        warn_once(
            f"One of {groups} document groups holds {largest:.0%} of the targets: the standard errors are rough. "
            "Validate on more documents of its length."
        )


@cache
def warn_once(message: str) -> None:
    """Log a warning once in a process."""
    log.warning("%s", message)
