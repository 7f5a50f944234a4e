"""Sizes of the speed benchmarks: mini with 8 sequences of 256 tokens; on a GPU small with 16 of 1,024."""

BATCH = 8
CONTEXT = 256
MINI = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 1024}  # in nanoGPT's names; as conf/model/mini.yaml
SMALL = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}  # as conf/model/small.yaml
STEPS = {"mini": (MINI, BATCH, CONTEXT), "small": (SMALL, 16, 1024)}  # shape, sequences, tokens of each
