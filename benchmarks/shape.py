"""Sizes of the speed benchmarks: mini with 8 sequences of 256 tokens; on a GPU small with 16 of 1,024."""

import torch

from gpt2lab.settings import ModelShape

BATCH = 8
CONTEXT = 256
SHAPES = {  # as conf/model/*.yaml
    "nano": ModelShape(n_layer=2, n_head=2, n_embd=128),
    "micro": ModelShape(n_layer=4, n_head=4, n_embd=256),
    "mini": ModelShape(n_layer=6, n_head=6, n_embd=384),
    "distil": ModelShape(n_layer=6, n_head=12, n_embd=768),
    "small": ModelShape(n_layer=12, n_head=12, n_embd=768),
}
TINY = ModelShape(n_layer=1, n_head=2, n_embd=16)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS = {"mini": (SHAPES["mini"], BATCH, CONTEXT), "small": (SHAPES["small"], 16, 1024)}  # shape, sequences, tokens
