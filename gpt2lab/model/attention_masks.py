"""Attention spans: which positions each position sees. Every mask of this project is one interval for each position.

Shapes: B sequences, T positions. Of sequence b position i sees positions spans[b, i, 0] to spans[b, i, 1] − 1.

    causal                    [0, i + 1)
    bidirectional             [0, T)
    prefix of P positions     [0, max(i + 1, P))                        the source sees itself both ways
    several documents         the same within the document [s, e) that holds i: [s, max(i + 1, min(P, e)))

Positions of a document are counted from its first one. Where there are no spans, attention is causal.
"""

import torch
from torch import Tensor


def document_bounds(starts: Tensor) -> tuple[Tensor, Tensor]:
    """First position of each position's document and the one after its last: (B, T) int64 each.

    Args:
        starts: (B, T) bool, where a document begins; position 0 always does.
    """
    length = starts.shape[1]
    positions = torch.arange(length).expand_as(starts)
    first = torch.where(starts, positions, 0).cummax(1).values
    following = torch.where(starts, positions, length).roll(-1, 1)
    following[:, -1] = length
    end = following.flip(1).cummin(1).values.flip(1)
    return first, end


def spans_of(first: Tensor, end: Tensor, both_ways: Tensor | int = 0) -> Tensor:
    """(B, T, 2) spans from document bounds (B, T).

    Args:
        both_ways: position up to which a document sees itself both ways, (B, T), (B, 1) or one for all: 0 is causal.
    """
    positions = torch.arange(first.shape[1])
    ahead = torch.minimum(torch.as_tensor(both_ways).expand_as(end), end)
    return torch.stack([first, torch.maximum(positions + 1, ahead)], dim=2)


def causal_spans(input_ids: Tensor) -> Tensor:
    """(B, T) → (B, T, 2): each position sees itself and all before it."""
    ends = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device).expand_as(input_ids)
    return torch.stack([torch.zeros_like(ends), ends], dim=2)


def positions_of(spans: Tensor) -> Tensor:
    """(B, T) positions counted from each document's first."""
    return torch.arange(spans.shape[1], device=spans.device) - spans[..., 0]


def visible(spans: Tensor) -> Tensor:
    """(B, 1, T, T) bool: whether position i (third) sees position j (last)."""
    keys = torch.arange(spans.shape[1], device=spans.device)
    return ((keys >= spans[..., :1]) & (keys < spans[..., 1:])).unsqueeze(1)


def as_mask(seen: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """What is seen, (B, 1, T, T) bool, as the mask of sdpa or eager attention. Eager attention adds it to its scores.

    Raises:
        ValueError: an implementation that takes no such mask, as flash attention.
    """
    if implementation == "sdpa":
        return seen
    if implementation == "eager":
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    raise ValueError(f"Attention implementation {implementation} takes no mask.")
