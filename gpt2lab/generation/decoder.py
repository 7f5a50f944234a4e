"""Decoder: a GPT-2 that reads on where it stopped, for it keeps the keys and values of what it has read.

Shapes: B rows, T tokens read in one call, S tokens read with those before, R room, H heads, D width, V vocabulary.

It calls the model's own modules in their order and nothing else, so it computes what `transformers`' forward computes.
That forward prepares masks, outputs and caches anew at every token, which takes longer than the arithmetic of a small
model: with two threads of a CPU decoding by `transformers` takes nano 2.8 times as long, micro 2.1 times, small 1.2
times (docs/tasks.md). Keys and values are written into room that is there from the start, where a DynamicCache copies
all of them at every token.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2LMHeadModel


class Decoder:
    """A model and what it has read.

    Args:
        model: in either layout, in eval mode.
        room: the most tokens that a row will have.
        padding: (B,) how many tokens at each row's left mean nothing; None: none anywhere.
    """

    def __init__(self, model: GPT2LMHeadModel, room: int, padding: Tensor | None = None) -> None:
        self.transformer, self.head = model.transformer, model.lm_head
        self.blocks: list[Any] = list(model.transformer.h)  # of modules, whose parts a type checker does not know
        self.heads = model.config.n_head
        self.room = room
        self.padding = None if padding is None or not padding.any() else padding[:, None, None, None]
        self.places = torch.arange(room, device=model.transformer.wte.weight.device)
        self.kept: list[Tensor] = []  # keys and values of each block, (2, B, H, R, D / H)
        self.length = 0

    def read(self, ids: Tensor, last: int = 1, *, both_ways: bool = False) -> Tensor:
        """Logits (B, last, V) after the last of the tokens (B, T) that follow what has been read.

        With `both_ways` these tokens see each other both ways.
        """
        start, self.length = self.length, self.length + ids.shape[1]
        positions = self.places[start : self.length]
        if self.padding is not None:
            positions = (positions - self.padding[:, :, 0, 0]).clamp_min(0)  # (B, T)
        seen = self._seen(start, both_ways)
        causal = seen is None and ids.shape[1] > 1 and not both_ways
        hidden = self.transformer.wte(ids) + self.transformer.wpe(positions)  # (B, T, D)
        for number, block in enumerate(self.blocks):
            hidden = hidden + self._attend(number, block.attn, block.ln_1(hidden), seen, causal)
            mlp = block.mlp
            hidden = hidden + mlp.c_proj(mlp.act(mlp.c_fc(block.ln_2(hidden))))
        return self.head(self.transformer.ln_f(hidden[:, -last:]))

    def forget(self, length: int) -> None:
        """All but the first `length` tokens, where there are more."""
        self.length = min(self.length, length)

    def _seen(self, start: int, both_ways: bool) -> Tensor | None:
        """Which keys each query sees, (T, S) or (B, 1, T, S) bool; None: all of them, or all up to itself."""
        keys, queries = self.places[: self.length], self.places[start : self.length, None]
        single = len(queries) == 1
        if self.padding is None:
            return None if both_ways or single or not start else keys <= queries
        seen = keys >= self.padding  # (B, 1, 1, S)
        if single and start:
            return seen
        return (seen if both_ways else seen & (keys <= queries)) | (keys == queries)  # padding too must see something

    def _attend(self, number: int, attention: Any, hidden: Tensor, seen: Tensor | None, causal: bool) -> Tensor:
        rows, count, width = hidden.shape
        split = attention.c_attn(hidden).view(rows, count, 3, self.heads, width // self.heads)
        query, *new = split.permute(2, 0, 3, 1, 4).unbind()  # (B, H, T, D / H) each
        if number == len(self.kept):
            self.kept.append(query.new_empty(2, rows, self.heads, self.room, width // self.heads))
        kept = self.kept[number][:, :, :, : self.length]
        for old, fresh in zip(kept, new, strict=True):
            old[:, :, self.length - count :] = fresh
        mixed = functional.scaled_dot_product_attention(query, kept[0], kept[1], attn_mask=seen, is_causal=causal)
        return attention.c_proj(mixed.transpose(1, 2).reshape(rows, count, width))
