"""Label statistics: loss, rank and confidence of each target, without gradients and without a whole row of logits.

Shapes: n targets, D hidden width, V vocabulary size, C rows of a chunk, W tokens of a tile of the vocabulary.

A CPU computes the logits of C targets and W tokens at a time, which stay in its cache until they are summed; a GPU
takes the whole vocabulary as one tile. Every logit is taken relative to that of its row's label: the label's
probability is 1 / Σ exp(logit − label's logit).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2lab.losses.logit_chunks import transposed

LOG2_E = math.log2(math.e)
ROWS, TOKENS_OF_A_TILE = 1024, 1024  # of a tile on a CPU: 4 MiB in fp32
LOGITS_OF_A_CHUNK, ROWS_OF_A_CHUNK = 2**25, 512  # at most, on other devices; they take 128 MiB in fp32


@dataclass(frozen=True)
class LabelStatistics:
    """Figures (n,) of each target.

    Attributes:
        nats: cross-entropy, in fp32 or wider.
        rank: number of tokens with a larger logit than the label, as a float.
        confidence: probability of the top-1 token.
    """

    nats: Tensor
    rank: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class VocabularyTiles:
    """A head cut into tiles of its vocabulary.

    Attributes:
        weight: (V, D).
        matrices: (D, W) each, in the dtype of the matrix products; for 16-bit dtypes on a CPU copies. On a GPU W is V,
            padded by `transposed`.
    """

    weight: Tensor
    matrices: tuple[Tensor, ...]


Chunk = tuple[Tensor, VocabularyTiles, Tensor]  # hidden states (C, D), head and labels (C,)


@torch.no_grad()
def vocabulary_tiles(weight: Tensor, dtype: torch.dtype) -> VocabularyTiles:
    """Cut a head (V, D) without padding into tiles for products in `dtype`."""
    width = TOKENS_OF_A_TILE if weight.device.type == "cpu" else len(weight)
    with torch.autocast(weight.device.type, enabled=False):
        return VocabularyTiles(weight, tuple(transposed(part, dtype) for part in weight.split(width)))


@torch.no_grad()
def label_losses(hidden: Tensor, tiles: VocabularyTiles, labels: Tensor) -> Tensor:
    """Return the loss of each target (n,) alone, with the arguments of `label_statistics`."""
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.cat([_losses(*chunk) for chunk in _chunks(hidden, tiles, labels)])


@torch.no_grad()
def label_statistics(hidden: Tensor, tiles: VocabularyTiles, labels: Tensor) -> LabelStatistics:
    """Return the statistics of each target; independent of autocast.

    Args:
        hidden: (n, D) hidden states at the targets.
        labels: (n,) int64.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [_statistics(*chunk) for chunk in _chunks(hidden, tiles, labels)]
    return LabelStatistics(*(torch.cat(figures) for figures in zip(*parts, strict=True)))


def _chunks(hidden: Tensor, tiles: VocabularyTiles, labels: Tensor) -> Iterator[Chunk]:
    rows = ROWS
    if hidden.device.type != "cpu":
        rows = min(max(LOGITS_OF_A_CHUNK // len(tiles.weight), 1), ROWS_OF_A_CHUNK)
    hidden = hidden.to(tiles.matrices[0].dtype)
    for part, of_part in zip(hidden.split(rows), labels.split(rows), strict=True):
        yield part, tiles, of_part


def _losses(hidden: Tensor, tiles: VocabularyTiles, labels: Tensor) -> Tensor:
    """Compute the losses (C,) from hidden states (C, D)."""
    sums = [_exponentials(scores).sum(1) for scores in _relative_logits(hidden, tiles, labels)]
    return _nats(sums, hidden, tiles, labels)


def _statistics(hidden: Tensor, tiles: VocabularyTiles, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the three (C,) from hidden states (C, D).

    On a CPU each operation is chosen for its speed: sums of booleans and a maximum with its index take several times
    as long as an exponential.
    """
    tops, sums, ranks = [], [], []
    for scores in _relative_logits(hidden, tiles, labels):
        tops.append(scores.amax(1))
        sums.append(_exponentials(scores).sum(1))
        ranks.append(scores.gt_(1).sum(1))
    nats = _nats(sums, hidden, tiles, labels)
    return nats, torch.stack(ranks).sum(0), (torch.stack(tops).amax(0) - nats).exp()


def _exponentials(scores: Tensor) -> Tensor:
    """Compute exp in place, as a power of two: PyTorch's exp is MKL's, which takes twice as long on an AMD CPU."""
    return scores.mul_(LOG2_E).exp2_()


def _nats(sums: list[Tensor], hidden: Tensor, tiles: VocabularyTiles, labels: Tensor) -> Tensor:
    """Return the losses (C,) from the sums of exponentials (C,) of each tile.

    A sum overflows where a logit is far above the label's; such rows are computed again with logsumexp.
    """
    nats = torch.stack(sums).sum(0).log()
    if (far := nats.isinf()).any():
        parts = [scores.logsumexp(1) for scores in _relative_logits(hidden[far], tiles, labels[far])]
        nats[far] = torch.stack(parts).logsumexp(0)
    return nats


def _relative_logits(hidden: Tensor, tiles: VocabularyTiles, labels: Tensor) -> Iterator[Tensor]:
    """Yield the logits (C, W) of each tile less that of the row's label.

    For the label itself they are exactly 0, or NaN if its logit is infinite.
    """
    wide = torch.promote_types(torch.float32, hidden.dtype)
    of_labels = tiles.weight.index_select(0, labels).to(hidden.dtype)  # (C, D); refuses negative labels
    label_scores = (hidden.to(wide) * of_labels).sum(1, keepdim=True).to(hidden.dtype).to(wide)  # (C, 1)
    zeros, columns = (label_scores - label_scores).squeeze(1), labels
    for matrix in tiles.matrices:
        scores = (hidden @ matrix)[:, : len(tiles.weight)].to(wide).sub_(label_scores)  # (C, W), without padding
        # Its two products may differ in their rounding. A search for a tile's own labels would wait for a GPU.
        if len(tiles.matrices) == 1:
            scores.scatter_(1, columns[:, None], zeros[:, None])
        else:
            own = ((columns >= 0) & (columns < scores.shape[1])).nonzero().squeeze(1)
            scores[own, columns[own]] = zeros[own]
        yield scores
        columns = columns - scores.shape[1]
