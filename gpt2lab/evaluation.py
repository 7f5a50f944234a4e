"""How well a model predicts batches of text: loss, bits per byte, accuracy, calibration, each with its error.

Shapes: B sequences, T positions, n targets of one row, D hidden width, V vocabulary.

Everything is a function of sums over rows (windows or pairs), so that errors can be told (gpt2lab/standard_errors.py).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gpt2lab.backbone import Backbone
from gpt2lab.batch import IGNORE_INDEX, Batch
from gpt2lab.distillation_metrics import CALIBRATION_BINS, LIKELIEST
from gpt2lab.standard_errors import Figures, Sums, standard_errors, total

LOGITS_OF_A_CHUNK = 2**23
TOKENS, BYTES, NATS, TOP1, TOP5, CALIBRATION = "tokens", "bytes", "nats", "top1", "top5", "calibration"


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text.

    Attributes:
        loss: nats per target token.
        perplexity: exp(loss).
        bits_per_byte: bits per UTF-8 byte that the target tokens spell; comparable between tokenizers.
        tokens: how many targets were scored.
        bytes: how many bytes of text these spell.
        top1, top5: share of the targets that the model held likeliest, and among its five likeliest.
        ece: expected calibration error, in 15 bins of confidence (Guo et al. 2017, arXiv 1706.04599).
        standard_errors: of each of these but `tokens` and `bytes`; empty where the text is a single row.
        rows: the sums of each row of text.
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
    rows: list[Sums] = field(default_factory=list, repr=False, compare=False)

    @property
    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {name: value for name, value in vars(self).items() if name != "rows"}

    @property
    def figures(self) -> Figures:
        """By name; what was only counted is left out."""
        names = ("loss", "perplexity", "bits_per_byte", "top1", "top5", "ece")
        return {name: vars(self)[name] for name in names}


def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(V,) int64: how many bytes of text each entry of a byte-level BPE spells; special tokens spell none.

    In a byte-level vocabulary (GPT-2's, and those trained here) each character of an entry stands for one byte.
    """
    special = set(tokenizer.all_special_ids)
    entries = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([0 if number in special else len(entry) for number, entry in enumerate(entries)])


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
        token_bytes: (V,) bytes of each token, from `bytes_of_tokens`; a longer head is cut to these entries: the rest
            is padding and means no token.
        autocast: number format of the matrix products; None computes in the weights' own.

    Raises:
        ValueError: the batches hold no target.
    """
    backbone.to(device).eval()
    rows: list[Sums] = []
    for batch in batches:

        def head(hidden: Tensor, weight: Tensor, batch: Batch = batch) -> list[Sums]:
            return row_sums(hidden, weight[: len(token_bytes)], batch, token_bytes)

        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            rows += backbone(batch.input_ids.to(device), head, batch.spans_on(device))
    return score_of(rows)


def score_of(rows: list[Sums]) -> Score:
    """The score of rows, as `row_sums` gives them.

    Raises:
        ValueError: no target.
    """
    if not rows:
        raise ValueError("The batches hold no target token.")
    sums = total(rows)
    found = _figures(sums)
    tokens, size = int(sums[TOKENS]), int(sums[BYTES])
    return Score(**found, tokens=tokens, bytes=size, standard_errors=standard_errors(rows, _figures), rows=rows)


def difference_of_losses(first: Score, second: Score) -> tuple[float, float | None] | None:
    """(first − second, standard error); None where they did not score the same rows, as with other tokenizers."""
    # Other tokenizers can cut a text into as many tokens, but not into tokens that spell as many bytes.
    sizes = [[(row[TOKENS].item(), row[BYTES].item()) for row in score.rows] for score in (first, second)]
    if sizes[0] != sizes[1]:
        return None
    rows = [
        {TOKENS: ours[TOKENS], NATS: ours[NATS] - theirs[NATS]}
        for ours, theirs in zip(first.rows, second.rows, strict=True)
    ]
    errors = standard_errors(rows, lambda sums: {"loss": sums[NATS].item() / sums[TOKENS].item()})
    return first.loss - second.loss, errors.get("loss")


def row_sums(hidden: Tensor, weight: Tensor, batch: Batch, token_bytes: Tensor) -> list[Sums]:
    """Sums over the targets of each row that has any, on the CPU.

    Args:
        hidden: (B, T, D).
        weight: (V, D) head.
        token_bytes: (V,).
    """
    kept = batch.labels != IGNORE_INDEX  # (B, T)
    labels, counts = batch.labels[kept], kept.sum(1).tolist()
    chunks = _of_chunks(hidden[kept.to(hidden.device)], weight, labels.to(hidden.device))
    nats, rank, confidence = (torch.cat(parts).cpu() for parts in zip(*chunks, strict=True))  # (n of all rows,) each
    bins = (confidence * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
    rows, start = [], 0
    for count in counts:
        own = slice(start, start + count)
        start += count
        if not count:
            continue
        surplus = (rank[own] == 0).double() - confidence[own].double()
        rows.append(
            {
                TOKENS: torch.tensor(count),
                BYTES: token_bytes[labels[own]].sum(),
                NATS: nats[own].double().sum(),
                TOP1: (rank[own] == 0).sum(),
                TOP5: (rank[own] < LIKELIEST).sum(),
                CALIBRATION: torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add_(0, bins[own], surplus),
            }
        )
    return rows


def _of_chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each target (n,): nats, how many entries the model holds likelier, and the probability of its likeliest."""
    rows_of_a_chunk, head = max(LOGITS_OF_A_CHUNK // len(weight), 1), weight.to(hidden.dtype).T  # (D, V)
    for start in range(0, max(len(labels), 1), rows_of_a_chunk):  # without any row one empty chunk
        part = slice(start, start + rows_of_a_chunk)
        logits = (hidden[part] @ head).float()  # (C, V)
        of_label = logits.gather(1, labels[part].unsqueeze(1))  # (C, 1)
        normaliser = logits.logsumexp(1)
        yield (
            normaliser - of_label.squeeze(1),
            (logits > of_label).sum(1),
            (logits.max(1).values - normaliser).exp(),
        )


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
