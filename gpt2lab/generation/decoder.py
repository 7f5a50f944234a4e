"""Decoder: incremental GPT-2 forward with a preallocated key-value cache.

Shapes: B rows, T tokens of one call, S tokens including those before, R maximum length, H heads, D width, V vocabulary.

It calls the model's modules in order, so it computes the same as the forward of `transformers`. That forward prepares
masks, outputs and caches at every token, which takes longer than the arithmetic of a small model: on two CPU threads
decoding with `transformers` takes 2.0 times as long for nano, 1.8 times for micro, 1.4 times for small
(docs/measurements/decoding.md). Keys and values are written in place, where a DynamicCache copies all of them at every
token. For bf16 on a CPU they are stored in fp32, in which PyTorch's attention of one query is faster there.
Matrices are packed once for products of several rows (packed_products.py).
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2LMHeadModel

from gpt2lab.generation.packed_products import PackedProducts


class Decoder:
    """Model with its key-value cache.

    Args:
        model: in either layout, in eval mode.
        max_length: maximum number of tokens per row.
        padding: (B,) number of padding tokens at the left of each row; None: no padding.
    """

    def __init__(self, model: GPT2LMHeadModel, max_length: int, padding: Tensor | None = None) -> None:
        self.transformer, self.head = model.transformer, model.lm_head
        self.blocks: list[Any] = list(model.transformer.h)  # Any: type checkers do not know the submodules
        self.heads = model.config.n_head
        self.product = PackedProducts(model)
        self.max_length = max_length
        self.padding = None if padding is None or not padding.any() else padding[:, None, None, None]
        self.positions = torch.arange(max_length, device=model.transformer.wte.weight.device)
        self.cache: list[Tensor] = []  # keys and values of each block, (2, B, H, R, D / H)
        self.length = 0

    def read(self, ids: Tensor, last: int = 1, *, bidirectional: bool = False) -> Tensor:
        """Append tokens (B, T) to those read before and return the logits (B, last, V) at the last of them.

        Args:
            bidirectional: whether these tokens attend to each other in both directions.
        """
        start, self.length = self.length, self.length + ids.shape[1]
        positions = self.positions[start : self.length]
        if self.padding is not None:
            positions = (positions - self.padding[:, :, 0, 0]).clamp_min(0)  # (B, T)
        mask = self._mask(start, bidirectional)
        causal = mask is None and ids.shape[1] > 1 and not bidirectional
        hidden = self.transformer.wte(ids) + self.transformer.wpe(positions)  # (B, T, D)
        for number, block in enumerate(self.blocks):
            hidden = hidden + self._attend(number, block.attn, block.ln_1(hidden), mask, causal)
            mlp = block.mlp
            inner = mlp.act(self.product(mlp.c_fc, block.ln_2(hidden)))  # (B, T, 4 · D)
            hidden = hidden + self.product(mlp.c_proj, inner)
        return self.product(self.head, self.transformer.ln_f(hidden[:, -last:]))

    def truncate(self, length: int) -> None:
        """Keep at most the first `length` tokens."""
        self.length = min(self.length, length)

    def _mask(self, start: int, bidirectional: bool) -> Tensor | None:
        """Return the attention mask, (T, S) or (B, 1, T, S) bool; None: full or causal attention."""
        keys, queries = self.positions[: self.length], self.positions[start : self.length, None]
        single = len(queries) == 1
        if self.padding is None:
            return None if bidirectional or single or not start else keys <= queries
        mask = keys >= self.padding  # (B, 1, 1, S)
        if single and start:
            return mask
        return (mask if bidirectional else mask & (keys <= queries)) | (keys == queries)  # padding attends to itself

    def _attend(self, number: int, attention: Any, hidden: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        rows, count, width = hidden.shape
        split = self.product(attention.c_attn, hidden).view(rows, count, 3, self.heads, width // self.heads)
        query, *new = split.permute(2, 0, 3, 1, 4).unbind()  # (B, H, T, D / H) each
        dtype = query.dtype
        is_widened = dtype == torch.bfloat16 and query.device.type == "cpu"
        query = query.float() if is_widened else query
        if number == len(self.cache):
            self.cache.append(query.new_empty(2, rows, self.heads, self.max_length, width // self.heads))
        cached = self.cache[number][:, :, :, : self.length]
        for old, fresh in zip(cached, new, strict=True):
            old[:, :, self.length - count :] = fresh
        with torch.autocast("cpu", enabled=False) if is_widened else nullcontext():
            mixed = functional.scaled_dot_product_attention(query, cached[0], cached[1], mask, is_causal=causal)
        return self.product(attention.c_proj, mixed.transpose(1, 2).reshape(rows, count, width).to(dtype))
