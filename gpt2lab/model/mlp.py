"""MLP of a block: linear, tanh GELU, linear; with faster ways to compute the GELU on a CPU.

Shapes: D hidden width, F inner width (4 · D).

On a CPU PyTorch's tanh GELU takes half as long as the linear layer before it, most of it in tanh. Compiled code
computes it with one exponential instead, since (1 + tanh u) / 2 is sigmoid(2u). Without a gradient, the linear layer
and GELU are one oneDNN operation.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from gpt2lab.system import onednn
from gpt2lab.system.device import compute_dtype, cpu_has_bf16

FEWEST_FUSED = 64  # rows; with fewer, the weights would be cast too often under autocast, and little is gained
COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715  # GELU(x) ≈ x · sigmoid(SCALE · (x + CUBIC · x³))


class FastMLP(nn.Module):
    """The function of `transformers`' GPT2MLP, with its parameters under their names."""

    def __init__(self, mlp: GPT2MLP) -> None:
        super().__init__()
        self.c_fc, self.act, self.c_proj, self.dropout = mlp.c_fc, Gelu(), mlp.c_proj, mlp.dropout

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute (…, D) → (…, D)."""
        fuses = not torch.is_grad_enabled() and fuses_gelu(self.c_fc, hidden)
        inner = linear_gelu(self.c_fc, hidden) if fuses else self.act(self.c_fc(hidden))
        return self.dropout(self.c_proj(inner))


class Gelu(nn.Module):
    """Tanh GELU.

    Attributes:
        compiled: whether forward and backward are compiled on a CPU, each to one pass over memory; set by
            `Backbone.compile_gelu`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.compiled = False

    def forward(self, inner: Tensor) -> Tensor:
        if inner.device.type == "cpu" and inner.dtype in COMPILED_DTYPES:
            if torch.compiler.is_compiling():
                return _gelu(inner)
            if self.compiled and torch.is_grad_enabled():
                return _CompiledGelu.apply(inner)
        return functional.gelu(inner, approximate="tanh")


class _CompiledGelu(torch.autograd.Function):
    """GELU with its gradient in closed form. Inputs are flattened, so that one compiled function serves all shapes."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor) -> Tensor:
        ctx.save_for_backward(inner)
        return _compiled()[0](inner.flatten()).view(inner.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inner,) = ctx.saved_tensors
        return _compiled()[1](gradient.flatten(), inner.flatten()).view(inner.shape)


def fuses_gelu(linear: nn.Module, hidden: Tensor) -> bool:
    """Return whether `linear_gelu` is available for these inputs, and faster than GELU(linear(hidden)).

    Adapters, sharded weights and fewer than FEWEST_FUSED rows are excluded.
    """
    if hidden.device.type != "cpu" or torch.compiler.is_compiling() or not onednn.has_operators():
        return False
    has_rows = hidden.numel() >= FEWEST_FUSED * hidden.shape[-1]
    is_plain = has_rows and onednn.is_plain(linear, nn.Linear)
    dtype = compute_dtype(hidden)
    return is_plain and (dtype == torch.float32 or (dtype == torch.bfloat16 and cpu_has_bf16()))


def linear_gelu(linear: Any, hidden: Tensor) -> Tensor:
    """Compute GELU(linear(hidden)), (…, D) → (…, F), without a gradient, in the dtype of autocast."""
    dtype = compute_dtype(hidden)
    weight, bias = linear.weight.to(dtype), linear.bias.to(dtype)
    return torch.ops.mkldnn._linear_pointwise(hidden.to(dtype), weight, bias, "gelu", [], "tanh")


def _gelu(inner: Tensor) -> Tensor:
    x = inner.float()
    return (x * torch.sigmoid(SCALE * x * (1 + CUBIC * x * x))).to(inner.dtype)


def _gelu_gradient(gradient: Tensor, inner: Tensor) -> Tensor:
    x = inner.float()
    squared = x * x
    gate = torch.sigmoid(SCALE * x * (1 + CUBIC * squared))
    slope = gate * (1 + x * (1 - gate) * SCALE * (1 + 3 * CUBIC * squared))
    return (gradient.float() * slope).to(inner.dtype)


@cache
def _compiled() -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    # dynamic: the number of positions varies, and each new one would be compiled again
    return torch.compile(_gelu, dynamic=True), torch.compile(_gelu_gradient, dynamic=True)
