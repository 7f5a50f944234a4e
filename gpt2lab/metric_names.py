"""The names under which metrics are logged, written to metrics.csv, shown on W&B and reported."""

TRAIN_LOSS = "train/loss"  # cross-entropy, nats per target token, in distillation too
TRAIN_OBJECTIVE = "train/objective"  # what distillation minimises
VAL_LOSS = "val/loss"  # as train/loss
VAL_PERPLEXITY = "val/perplexity"
VAL_BITS_PER_BYTE = "val/bits_per_byte"
LEARNING_RATE = "lr"
GRAD_NORM = "grad_norm"
TOKENS = "tokens"
TOKENS_PER_SECOND = "tokens_per_second"
MFU = "mfu"
MEMORY_GB = "memory_gb"
DISTILL_KL = "distill/kl"
