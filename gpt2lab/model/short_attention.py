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

MOST_POSITIONS = 512  # with more, the probabilities of training take too much memory
MOST_WITHOUT_GRADIENT = 1024  # positions of causal attention that keeps no probabilities
BLOCK = 128  # queries; a block does not compute the products with later keys
# Where a CPU emulates bf16, two of these in one compiled graph give NaN (torch 2.13, avx512 without avx512_bf16)
HAS_BF16 = cpu_has_bf16()


class _PlainAttention(torch.autograd.Function):
    """Softmax(scale · Q Kᵀ + bias) V with its gradient in closed form, for one block of queries after the other.

    A block reads the keys up to its last query. `bias` is added to the scores of the block's own positions, queries and
    keys. Probabilities are kept for the backward pass only if `keeps_probabilities`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor,
        scale: float,
        blocks: list[tuple[int, int]],
        keeps_probabilities: bool,
    ) -> Tensor:
        shape, pairs = query.shape, (-1, *query.shape[-2:])  # products of 4-D tensors would copy their parts each time
        query, key, value = (query * scale).reshape(pairs), key.reshape(pairs), value.reshape(pairs)  # (B·H, T, D)
        output, saved = torch.empty_like(query), []
        for first, last in blocks:
            scores = torch.bmm(query[:, first:last], key[:, :last].mT)  # (B·H, last - first, last)
            diagonal = scores.view(*shape[:2], last - first, last)[..., first:]
            diagonal.add_(bias[..., : last - first, : last - first])
            probabilities = torch.softmax(scores, dim=-1)
            output[:, first:last] = torch.bmm(probabilities, value[:, :last])
            saved += [probabilities] if keeps_probabilities else []
        ctx.save_for_backward(query, key, value, *saved)
        ctx.scale, ctx.blocks = scale, blocks
        return output.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        shape, gradient = gradient.shape, gradient.reshape(query.shape)
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (first, last), probabilities in zip(ctx.blocks, saved, strict=True):
            grad_output = gradient[:, first:last]
            grad_probabilities = torch.bmm(grad_output, value[:, :last].mT)
            grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
            grad_query[:, first:last] = torch.bmm(grad_scores, key[:, :last])
            grad_key[:, :last] += torch.bmm(grad_scores.mT, query[:, first:last])
            grad_value[:, :last] += torch.bmm(probabilities.mT, grad_output)
        return (
            (grad_query * ctx.scale).view(shape),
            grad_key.view(shape),
            grad_value.view(shape),
            None,
            None,
            None,
            None,
        )


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

    Sequences in bf16 on a CPU that has it in hardware, without cache and dropout, are computed here, all others by
    SDPA. They have at most MOST_POSITIONS, or MOST_WITHOUT_GRADIENT if causal and without a gradient. A position that
    may attend to nothing gets the average of all values.
    """
    most = MOST_POSITIONS if torch.is_grad_enabled() or attention_mask is not None else MOST_WITHOUT_GRADIENT
    # The device first: a compiled graph would depend on each length that is compared.
    is_on_cpu = HAS_BF16 and query.device.type == "cpu" and query.dtype == torch.bfloat16
    if not is_on_cpu or dropout or query.shape != key.shape or not 1 < query.shape[-2] <= most:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    blocks = _blocks(query.shape[-2], is_causal=attention_mask is None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias = _bias(attention_mask, query, blocks)
    output = _PlainAttention.apply(query, key, value, bias, scale, blocks, torch.is_grad_enabled())
    return output.transpose(1, 2).contiguous(), None


def _blocks(length: int, is_causal: bool) -> list[tuple[int, int]]:
    """Return (first query, last + 1) of the blocks; a mask may let a query see later keys, so it has a single one."""
    if not is_causal:
        return [(0, length)]
    if torch.compiler.is_compiling():  # a number of blocks that depends on the length would be compiled again
        return [(0, length // 2), (length // 2, length)]
    return [(first, min(first + BLOCK, length)) for first in range(0, length, BLOCK)]


def _bias(mask: Tensor | None, query: Tensor, blocks: list[tuple[int, int]]) -> Tensor:
    """Return what is added to the scores: (N, N) for N queries of the longest block, or (B, 1, T, T)."""
    least = torch.finfo(query.dtype).min  # finite, so that no softmax is NaN
    if mask is None:
        size = max(last - first for first, last in blocks)
        return torch.full((size, size), least, dtype=query.dtype).triu_(1)
    return torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, least)


AttentionInterface.register(SHORT_ATTENTION, short_attention)
AttentionMaskInterface.register(SHORT_ATTENTION, sdpa_mask)
