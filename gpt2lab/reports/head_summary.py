"""Head summary: the position that each attention head mostly attends to, in two words."""

import torch
from torch import Tensor

MIN_SHARE = 0.3  # mean attention weight from which a position is reported
TINY = 1e-30  # so that 0 · log 0 = 0


def habits(attention: Tensor, spans: Tensor) -> list[str]:
    """Describe each head (H,) by the position with the largest mean attention weight, and that weight.

    If no position reaches 30 %, the description is the number of tokens over which attention is spread: e to the mean
    entropy of its rows. Rows that attend to a single token are excluded.

    Args:
        attention: (H, T, T) of one layer.
        spans: (T, 2) attention spans.
    """
    rows, (start, end) = torch.arange(len(spans), device=spans.device), spans.unbind(1)
    free = end - start > 1
    shares = {}
    for name, position in {"itself": rows, "previous": rows - 1, "first": start, "next": rows + 1}.items():
        valid = (position >= start) & (position < end) & free
        if name == "first":
            valid &= position < rows - 1  # otherwise it is the previous token, or itself
        weight = attention[:, rows, position.clamp(0, len(rows) - 1)]  # (H, T)
        shares[name] = ((weight * valid).sum(1) / valid.sum().clamp_min(1)).tolist()
    weights = attention[:, free]
    spreads = (-(weights * weights.clamp_min(TINY).log()).sum(2)).mean(1).exp().tolist()  # (H,)
    summaries = []
    for head, spread in enumerate(spreads):
        name = max(shares, key=lambda each: shares[each][head])
        share = shares[name][head]
        summaries.append(f"{name} {share:.0%}" if share >= MIN_SHARE else f"≈ {spread:.0f} tokens")
    return summaries
