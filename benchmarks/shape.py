"""The training step that the speed benchmarks share: model mini, 8 sequences of 256 tokens."""

BATCH = 8
CONTEXT = 256
MINI = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 1024}  # in nanoGPT's names; as conf/model/mini.yaml
