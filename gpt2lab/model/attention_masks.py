"""Attention spans: the interval of positions that each position attends to, and the masks made from it.

Shapes: B sequences, T positions. In sequence b, position i attends to positions spans[b, i, 0] to spans[b, i, 1] − 1.

    causal                    [0, i + 1)
    bidirectional             [0, T)
    prefix of P positions     [0, max(i + 1, P))                        bidirectional within the prefix
    several documents         the same within the document [s, e) of i: [s, max(i + 1, min(P, e)))

Position ids are counted from the first position of each document. Without spans attention is causal.
"""

import torch
from torch import Tensor

SHORT_ATTENTION = "gpt2lab_short"  # attention implementation of short_attention.py; its masks are those of sdpa


def document_bounds(starts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first position of each position's document and the one after its last: (B, T) int64 each.

    Args:
        starts: (B, T) bool, whether a document begins here; always true at position 0.
    """
    length = starts.shape[1]
    positions = torch.arange(length).expand_as(starts)
    first = torch.where(starts, positions, 0).cummax(1).values
    following = torch.where(starts, positions, length).roll(-1, 1)
    following[:, -1] = length
    end = following.flip(1).cummin(1).values.flip(1)
    return first, end


def make_spans(first: Tensor, end: Tensor, prefix_end: Tensor | int = 0) -> Tensor:
    """Make spans (B, T, 2) from document bounds (B, T).

    Args:
        prefix_end: end of the bidirectional prefix, (B, T), (B, 1) or one for all; 0: causal.
    """
    positions = torch.arange(first.shape[1])
    ahead = torch.minimum(torch.as_tensor(prefix_end).expand_as(end), end)
    return torch.stack([first, torch.maximum(positions + 1, ahead)], dim=2)


def causal_spans(input_ids: Tensor) -> Tensor:
    """Make causal spans (B, T, 2) for input_ids (B, T)."""
    ends = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device).expand_as(input_ids)
    return torch.stack([torch.zeros_like(ends), ends], dim=2)


def spans_to_position_ids(spans: Tensor) -> Tensor:
    """Return position_ids (B, T), counted from the first position of each document."""
    return torch.arange(spans.shape[1], device=spans.device) - spans[..., 0]


def spans_to_mask(spans: Tensor) -> Tensor:
    """Return the mask (B, 1, T, T) bool: whether position i (third axis) attends to position j (last axis)."""
    keys = torch.arange(spans.shape[1], device=spans.device)
    return ((keys >= spans[..., :1]) & (keys < spans[..., 1:])).unsqueeze(1)


def format_mask(mask: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """Convert a bool mask (B, 1, T, T) to that of sdpa (bool) or eager attention (added to the scores).

    Raises:
        ValueError: the implementation does not support such masks, for example flash attention.
    """
    if implementation in ("sdpa", SHORT_ATTENTION):
        return mask
    if implementation == "eager":
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    raise ValueError(f"Attention implementation {implementation} does not support masks; use sdpa or eager.")
