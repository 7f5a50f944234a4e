"""Loss, perplexity and bits per byte of a model on batches of text.

Shapes: B sequences, T positions, D hidden width, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gpt2lab.backbone import Backbone
from gpt2lab.batch import IGNORE_INDEX, Batch
from gpt2lab.lm_head_loss import lm_head_loss


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text.

    Attributes:
        loss: nats per target token.
        perplexity: exp(loss).
        bits_per_byte: bits per UTF-8 byte that the target tokens spell; comparable between tokenizers.
        tokens: how many targets were scored.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int


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
    nats, tokens, size = 0.0, 0, 0
    for batch in batches:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            nats += nats_of(backbone, batch, device, len(token_bytes))
        targets = targets_of(batch)
        tokens += len(targets)
        size += int(token_bytes[targets].sum())
    return score_of_sum(nats, tokens, size)


def nats_of(backbone: Backbone, batch: Batch, device: torch.device, entries: int) -> float:
    """Cross-entropy of the batch's targets, summed; of a longer head only the first `entries` count."""
    labels = batch.labels.flatten()
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(1).to(device)  # others are prompt or padding and need no logits
    kept_labels = targets_of(batch).to(device)

    def head(hidden: Tensor, weight: Tensor) -> float:
        return lm_head_loss(hidden.flatten(0, 1)[rows], weight[:entries], kept_labels).cross_entropy.item()

    return backbone(batch.input_ids.to(device), head, batch.spans_on(device))


def targets_of(batch: Batch) -> Tensor:
    """(n,) the labels that count."""
    return batch.labels[batch.labels != IGNORE_INDEX]


def score_of_sum(nats: float, tokens: int, size: int) -> Score:
    """The score of `tokens` targets that spell `size` bytes, from their summed cross-entropy.

    Raises:
        ValueError: no target.
    """
    if not tokens:
        raise ValueError("The batches hold no target token.")
    loss = nats / tokens
    return Score(loss, math.exp(min(loss, 100.0)), nats / math.log(2) / max(size, 1), tokens)
