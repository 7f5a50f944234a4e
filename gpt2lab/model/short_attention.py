"""Attention of short sequences in bf16 on a CPU, with plain matrix products.

Shapes: B sequences, H heads, T positions, D width of a head.

PyTorch's fused kernel never stores the (T, T) probabilities. For short sequences in bf16 its backward pass is the slow
part: with the probabilities stored, a step of mini with 256 positions takes 0.82 of the time
(docs/measurements/performance.md, "Reuse of freed memory"), for 2 · H · T bytes per position and layer.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from gpt2lab.model.attention_masks import SHORT_ATTENTION
from gpt2lab.system.device import cpu_has_bf16

LONGEST = 512  # positions; at 1,024 both take the same time
# Where a CPU emulates bf16, two of these in one compiled graph give NaN (torch 2.13, avx512 without avx512_bf16)
HAS_BF16 = cpu_has_bf16()


class _PlainAttention(torch.autograd.Function):
    """Softmax(scale · Q Kᵀ + bias) V with its gradient in closed form."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        query = query * scale
        probabilities = torch.softmax((query @ key.transpose(-1, -2)).add_(bias), dim=-1)  # (B, H, T, T)
        ctx.save_for_backward(query, key, value, probabilities)
        ctx.scale = scale
        return probabilities @ value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, probabilities = ctx.saved_tensors
        of_scores = torch._softmax_backward_data(
            gradient @ value.transpose(-1, -2), probabilities, -1, probabilities.dtype
        )
        of_value = probabilities.transpose(-1, -2) @ gradient
        return (of_scores @ key) * ctx.scale, of_scores.transpose(-1, -2) @ query, of_value, None, None


def short_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function of `transformers`: (B, H, T, D) → (B, T, H, D).

    Args:
        attention_mask: bool (B, 1, T, T); None: causal.

    Sequences in bf16 on a CPU that has it in hardware, with at most LONGEST positions, without cache and dropout, are
    computed here, all others by SDPA. A position that may attend to nothing gets the average of all values.
    """
    is_short = HAS_BF16 and query.shape == key.shape and 1 < query.shape[-2] <= LONGEST and not dropout
    if not is_short or query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    bias = _bias(attention_mask, query)
    output = _PlainAttention.apply(query, key, value, bias, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return output.transpose(1, 2).contiguous(), None


def _bias(mask: Tensor | None, query: Tensor) -> Tensor:
    """Return what is added to the scores: (T, T) or (B, 1, T, T)."""
    least = torch.finfo(query.dtype).min  # finite, so that no softmax is NaN
    if mask is None:
        return torch.full((query.shape[-2], query.shape[-2]), least, dtype=query.dtype).triu_(1)
    return torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, least)


AttentionInterface.register(SHORT_ATTENTION, short_attention)
AttentionMaskInterface.register(SHORT_ATTENTION, sdpa_mask)
