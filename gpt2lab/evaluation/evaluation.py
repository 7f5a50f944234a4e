"""Evaluation of a model on batches of text: loss, bits per byte, accuracy, calibration, each with its standard error.

Shapes: B sequences, T positions, n targets of a batch, D hidden width, V vocabulary size, G document groups.

All figures are functions of sums per document, from which jackknife.py computes the standard errors.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.evaluation.distillation_metrics import CALIBRATION_BINS
from gpt2lab.evaluation.jackknife import (
    TOKENS,
    DocumentDifference,
    Figures,
    GroupedSums,
    Sums,
    interval_factor,
    paired_mean_difference,
    standard_errors,
    total,
)
from gpt2lab.losses.label_statistics import VocabularyTiles, label_statistics, vocabulary_tiles
from gpt2lab.losses.teacher_signal import TOP
from gpt2lab.model.backbone import Backbone
from gpt2lab.system.device import compute_dtype

BYTES, NATS, TOP1, TOP5, CALIBRATION = "bytes", "nats", "top1", "top5", "calibration"


@dataclass(frozen=True)
class Score:
    """Scores of a model on a text.

    Attributes:
        loss: nats per target token.
        perplexity: exp(loss).
        bits_per_byte: bits per UTF-8 byte of the target tokens; comparable between tokenizers.
        tokens: number of targets.
        bytes: number of bytes of the targets.
        top1, top5: accuracy: share of the targets that are the top-1 token, or among the top-5 tokens.
        ece: expected calibration error, in 15 bins of confidence (Guo et al. 2017, arXiv 1706.04599).
        standard_errors: standard errors of the figures, between documents; empty for a single document.
        groups: number of documents, or of groups of them, between which errors are computed.
        interval_factor: half the width of a 95 % confidence interval, in standard errors.
        sums: sums (G, …) per document group, by name.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    top1: float
    top5: float
    ece: float
    standard_errors: Figures = field(default_factory=dict)
    groups: int = 0
    interval_factor: float = math.nan
    sums: Sums = field(default_factory=dict, repr=False, compare=False)

    @property
    def facts(self) -> dict[str, Any]:
        """Attributes that are written as JSON."""
        left_out = ("sums", "interval_factor")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    @property
    def figures(self) -> Figures:
        """Figures by name, without counts."""
        names = ("loss", "perplexity", "bits_per_byte", "top1", "top5", "ece")
        return {name: vars(self)[name] for name in names}


@torch.no_grad()
def score(
    backbone: Backbone,
    batches: Iterable[Batch],
    token_bytes: Tensor,
    *,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> Score:
    """Score every target of the batches once.

    Args:
        backbone: moved to `device` and put in evaluation mode.
        token_bytes: (V,) bytes of each token, from `bytes_of_tokens`; a longer head is padded, and truncated to V.
        autocast: dtype of the matrix products; None: that of the weights.

    Raises:
        ValueError: the batches have no target.
    """
    backbone.to(device).eval()
    grouped, tiles = GroupedSums(), None
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):  # casts each weight once
        for batch in batches:
            hidden, weight = hidden_and_head(backbone, batch, device)
            tiles = tiles or vocabulary_tiles(weight[: len(token_bytes)], compute_dtype(hidden))
            grouped.add(target_values(hidden, tiles, batch, token_bytes), target_groups(batch))
    return score_from_sums(grouped.scored())


def hidden_and_head(model: Backbone, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return hidden states (B, T, D) and head weight (V, D)."""
    return model(batch.input_ids.to(device), lambda hidden, weight: (hidden, weight), batch.spans_on(device))


def target_groups(batch: Batch) -> Tensor:
    """Return the document group (n,) of each target; where documents are unknown, each sample is a group."""
    if batch.documents is not None:
        return batch.documents
    rows = (batch.labels != IGNORE_INDEX).nonzero()[:, 0]
    return rows + (int(batch.indices[0]) if len(batch.indices) else 0)


def score_from_sums(sums: Sums) -> Score:
    """Compute the score from sums (G, …) over the targets of each document group.

    Raises:
        ValueError: there is no target.
    """
    if not sums or not len(sums[TOKENS]):
        raise ValueError("The batches have no target token.")
    whole = total(sums)
    return Score(
        **_figures(whole),
        tokens=int(whole[TOKENS]),
        bytes=int(whole[BYTES]),
        standard_errors=standard_errors(sums, _figures),
        groups=len(sums[TOKENS]),
        interval_factor=interval_factor(sums[TOKENS]),
        sums=sums,
    )


def paired_difference(first: Score, second: Score) -> DocumentDifference | None:
    """Return first − second, paired by document: of losses, or of bits per byte if their tokens differ.

    None if the two did not score the same bytes of the same documents.
    """
    ours, theirs = first.sums, second.sums
    if not torch.equal(ours[BYTES], theirs[BYTES]):
        return None
    if torch.equal(ours[TOKENS], theirs[TOKENS]):
        return paired_mean_difference(ours[NATS], theirs[NATS], ours[TOKENS])
    if first.bytes == 0:
        return None
    bits = (ours[NATS] / math.log(2), theirs[NATS] / math.log(2))
    return paired_mean_difference(*bits, ours[BYTES], "bits per byte")


def target_values(hidden: Tensor, tiles: VocabularyTiles, batch: Batch, token_bytes: Tensor) -> Sums:
    """Return the summands of each target, (n,) or (n, bins), on the CPU.

    Args:
        hidden: (B, T, D).
        tiles: of the head (V, D).
        token_bytes: (V,).
    """
    kept = batch.labels != IGNORE_INDEX  # (B, T)
    labels = batch.labels[kept]  # (n,)
    found = label_statistics(hidden[kept.to(hidden.device)], tiles, labels.to(hidden.device))
    nats, rank, confidence = found.nats.cpu(), found.rank.cpu(), found.confidence.cpu()  # (n,)
    bins = (confidence * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
    surplus = (rank == 0).double() - confidence.double()
    return {
        TOKENS: torch.ones(len(labels)),
        BYTES: token_bytes[labels],
        NATS: nats,
        TOP1: rank == 0,
        TOP5: rank < TOP,
        CALIBRATION: torch.zeros(len(labels), CALIBRATION_BINS, dtype=torch.float64).scatter_(
            1, bins[:, None], surplus[:, None]
        ),
    }


def _figures(sums: Sums) -> Figures:
    tokens, nats = sums[TOKENS].item(), sums[NATS].item()
    loss = nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 100.0)),
        "bits_per_byte": nats / math.log(2) / max(sums[BYTES].item(), 1),
        "top1": sums[TOP1].item() / tokens,
        "top5": sums[TOP5].item() / tokens,
        "ece": sums[CALIBRATION].abs().sum().item() / tokens,
    }
