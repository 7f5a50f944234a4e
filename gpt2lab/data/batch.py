"""Batch: what a data module hands to a training or validation step.

Shapes: B sequences of one micro-batch on one rank, T positions each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2lab.model.attention_masks import document_bounds, spans_of

IGNORE_INDEX = -100
MULTIPLE = 8  # tensor cores like it, and fewer lengths compile to fewer kernels


@dataclass
class Batch:
    """One micro-batch. Padding, where there is any, stands on the right and carries ignored labels.

    Without spans attention is causal: then a padded position on the right is never seen by a real one.
    """

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, what each position predicts: usually the token that follows; or IGNORE_INDEX
    target_tokens: int  # number of targets in the whole global batch of the optimizer step: all micro-batches and ranks
    indices: Tensor  # int64, position of each sample in the (training or validation) set; pairs may share a row
    prompt_lengths: Tensor | None = None  # int64, pairs only: each one's prompt tokens, in the order of indices
    references: list[str] | None = None  # (B,) pairs only: the target text, for metrics on generated text
    spans: Tensor | None = None  # (B, T, 2) int64, what each position sees (attention_masks.py); None: causal
    few_targets: bool = False  # whether many positions have no target, so that leaving those out of the head pays
    by_student: bool = False  # whether the student itself wrote the text, so that its labels teach nothing
    documents: Tensor | None = None  # (targets,) int64, row by row: the document group of each, for standard errors

    def spans_on(self, device: torch.device) -> Tensor | None:
        """Its spans, moved to a device."""
        return None if self.spans is None else self.spans.to(device)


@dataclass(frozen=True)
class PairTokens:
    """One pair as token ids."""

    tokens: Tensor  # (L,) prompt and response
    prompt_length: int
    index: int  # in the (training or validation) set


def pad_pairs(
    rows: Sequence[Sequence[PairTokens]],
    *,
    target_tokens: int,
    context: int,
    pad_id: int,
    both_ways: bool = False,
    packing: bool = False,
) -> Batch:
    """Pairs as one micro-batch, with labels on what follows each prompt.

    Args:
        rows: B sequences of one pair each, or of several that do not see each other.
        context: the most positions; T is that of the longest row, rounded up to a multiple of 8.
        target_tokens: as in Batch.
        both_ways: whether the tokens of a prompt, but for its last, see each other both ways.
        packing: whether rows may have several pairs, so that all batches have spans and one graph serves them.
    """
    longest = max(sum(len(pair.tokens) - 1 for pair in row) for row in rows)
    length = min(-(-longest // MULTIPLE) * MULTIPLE, context)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)  # (B, T)
    labels = torch.full((len(rows), length), IGNORE_INDEX, dtype=torch.int64)  # (B, T)
    starts = torch.zeros(len(rows), length, dtype=torch.bool)  # (B, T)
    ahead = torch.zeros(len(rows), length, dtype=torch.int64)  # (B, T)
    for place, row in enumerate(rows):
        start = 0
        for pair in row:
            end = start + len(pair.tokens) - 1
            input_ids[place, start:end] = pair.tokens[:-1]
            labels[place, start + pair.prompt_length - 1 : end] = pair.tokens[pair.prompt_length :]
            starts[place, start] = True
            if both_ways:
                ahead[place, start:end] = start + pair.prompt_length - 1
            start = end
        starts[place, start:] = True  # padding sees itself alone
    pairs = [pair for row in rows for pair in row]
    causal = not both_ways and not packing and len(pairs) == len(rows)
    return Batch(
        input_ids,
        labels,
        target_tokens,
        torch.tensor([pair.index for pair in pairs]),
        torch.tensor([pair.prompt_length for pair in pairs]),
        spans=None if causal else spans_of(*document_bounds(starts), ahead),
        few_targets=True,
    )


def packed(pairs: Sequence[PairTokens], context: int) -> list[list[PairTokens]]:
    """Pairs shared out over rows of at most `context` positions: the longest first, each into the first with room."""
    rows: list[list[PairTokens]] = []
    left: list[int] = []
    for pair in sorted(pairs, key=lambda pair: -len(pair.tokens)):
        size = len(pair.tokens) - 1
        place = next((place for place, room in enumerate(left) if room >= size), len(rows))
        if place == len(rows):
            rows.append([])
            left.append(context)
        rows[place].append(pair)
        left[place] -= size
    return rows
