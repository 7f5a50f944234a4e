"""Evaluation of a model on batches of text: loss, bits per byte, accuracy, calibration, each with its standard error.

Shapes: B sequences, T positions, n targets of a batch, D hidden width, V vocabulary size, G document groups.

All figures are functions of sums per document, from which jackknife.py computes the standard errors.
"""

import math
from collections.abc import Iterable, Iterator
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
from gpt2lab.losses.logit_chunks import logit_chunks, rows_of_a_block
from gpt2lab.losses.teacher_signal import TOP
from gpt2lab.model.backbone import Backbone

LOGITS_OF_A_CHUNK = 2**25  # of one matrix product; they take 128 MiB in fp32
ROWS_OF_A_CHUNK = 512  # a CPU multiplies this many faster than an odd number that fills the chunk

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
    grouped = GroupedSums()
    for batch in batches:

        def head(hidden: Tensor, weight: Tensor, batch: Batch = batch) -> Sums:
            return target_values(hidden, weight[: len(token_bytes)], batch, token_bytes)

        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            values = backbone(batch.input_ids.to(device), head, batch.spans_on(device))
        grouped.add(values, target_groups(batch))
    return score_from_sums(grouped.scored())


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


def target_values(hidden: Tensor, weight: Tensor, batch: Batch, token_bytes: Tensor) -> Sums:
    """Return the summands of each target, (n,) or (n, bins), on the CPU.

    Args:
        hidden: (B, T, D).
        weight: (V, D) head.
        token_bytes: (V,).
    """
    kept = batch.labels != IGNORE_INDEX  # (B, T)
    labels = batch.labels[kept]  # (n,)
    chunks = _label_statistics(hidden[kept.to(hidden.device)], weight, labels.to(hidden.device))
    nats, rank, confidence = (torch.cat(parts).cpu() for parts in zip(*chunks, strict=True))  # (n,) each
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


def _label_statistics(hidden: Tensor, weight: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield for each target of a block (C,): nats, rank of the label from 0, and probability of the top-1 token."""
    chunk = max(min(LOGITS_OF_A_CHUNK // len(weight), ROWS_OF_A_CHUNK), 1)
    for rows, logits in logit_chunks(hidden, weight, rows=chunk):
        block = rows_of_a_block(logits)
        yield from map(_statistics, logits.split(block), labels[rows].split(block))


def _statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the three from logits (C, V), which are overwritten.

    On a CPU each operation is chosen for its speed: sums of booleans and a maximum with its index take several times
    as long as the softmax.
    """
    scores, labels = logits.float(), labels.unsqueeze(1)  # (C, V), (C, 1)
    label_scores = scores.gather(1, labels)
    log_probability = scores.log_softmax(1).gather(1, labels)
    confidence = (scores.amax(1, keepdim=True) - label_scores + log_probability).exp()
    rank = scores.gt_(label_scores).sum(1)
    return -log_probability.squeeze(1), rank, confidence.squeeze(1)


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
