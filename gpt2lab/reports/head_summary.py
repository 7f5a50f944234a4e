"""Attention habits: in two words, where each head of a layer mostly looks."""

import torch
from torch import Tensor

CLEAR_HABIT = 0.3  # mean share from which a head is said to look at a place
TINY = 1e-30  # 0 · log 0 is 0


def habits(attention: Tensor, spans: Tensor) -> list[str]:
    """(H,) where each head mostly looks, in two words: a place and the mean share that it gets there.

    Where no place gets much, over how many tokens the head is spread: e to the mean entropy of its rows. Rows that see
    one token alone, which have no choice, are left out.

    Args:
        attention: (H, T, T) of one layer.
        spans: (T, 2) what each position sees.
    """
    rows, (start, end) = torch.arange(len(spans), device=spans.device), spans.unbind(1)
    free = end - start > 1
    shares = {}
    for name, place in {"itself": rows, "previous": rows - 1, "first": start, "next": rows + 1}.items():
        there = (place >= start) & (place < end) & free
        if name == "first":
            there &= place < rows - 1  # else it is the previous token, or itself
        of_rows = attention[:, rows, place.clamp(0, len(rows) - 1)]  # (H, T)
        shares[name] = ((of_rows * there).sum(1) / there.sum().clamp_min(1)).tolist()
    weights = attention[:, free]
    choices = (-(weights * weights.clamp_min(TINY).log()).sum(2)).mean(1).exp().tolist()  # (H,)
    told = []
    for head, spread in enumerate(choices):
        name = max(shares, key=lambda each: shares[each][head])
        share = shares[name][head]
        told.append(f"{name} {share:.0%}" if share >= CLEAR_HABIT else f"≈ {spread:.0f} tokens")
    return told
