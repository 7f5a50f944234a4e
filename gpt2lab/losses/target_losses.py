"""Target losses: the cross-entropy of each target, without gradients and without the whole batch's logits.

Shapes: n targets, D hidden width, V vocabulary size, C rows of one chunk.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from gpt2lab.losses.divergences import SMALLEST_LOG
from gpt2lab.losses.label_statistics import label_losses, vocabulary_tiles
from gpt2lab.losses.logit_chunks import logit_chunks
from gpt2lab.system.device import compute_dtype

LOGITS_OF_A_CHUNK = 2**24  # of one matrix product; they take 64 MiB in fp32


@torch.compiler.disable  # chunks are compiled separately; the caller's graph breaks here
@torch.no_grad()
def target_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int | None = None, compiled: bool = False
) -> Tensor:
    """Return the loss of each target (n,) in nats, in fp32 or wider; autocast sets the dtype of matrix products.

    Args:
        hidden: (n, D) hidden states at the targets.
        weight: (V, D) head; rows from `vocab_size` on are padding and are left out.
        labels: (n,) int64.
        compiled: run the work on a chunk's logits through torch.compile, except on a CPU.
    """
    dtype, head, device = compute_dtype(hidden), weight[:vocab_size], hidden.device.type
    if device == "cpu":
        return label_losses(hidden, vocabulary_tiles(head, dtype), labels)
    chunks = logit_chunks(hidden, head, most=LOGITS_OF_A_CHUNK, dtype=dtype)
    work = _chunk_function(compiled)
    with torch.autocast(device, enabled=False):
        parts = [work(logits, labels[rows]) for rows, logits in chunks] if len(labels) else []
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.promote_types(torch.float32, dtype))


def _nats(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row: (C, V), (C,) → (C,)."""
    logits = logits.to(torch.promote_types(torch.float32, logits.dtype))
    largest = logits.amax(1, keepdim=True)  # subtracted first, since a large logsumexp would round the loss
    of_label = logits.gather(1, labels.unsqueeze(1)) - largest  # (C, 1)
    return (logits - largest).clamp_min_(SMALLEST_LOG).exp_().sum(1).log() - of_label.squeeze(1)


@cache
def _chunk_function(compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    # dynamic: the number of targets varies, and each new one would be compiled again
    return torch.compile(_nats, dynamic=True) if compiled else _nats
