"""Batch: what a data module hands to a training or validation step.

Shapes: B sequences of one micro-batch on one rank, T positions each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100
MULTIPLE = 8  # tensor cores like it, and fewer lengths compile to fewer kernels


@dataclass
class Batch:
    """One micro-batch. Padding, where there is any, stands on the right and carries ignored labels.

    Under a causal mask a padded position on the right is never seen by a real one, so no attention mask is needed.
    """

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, already shifted: the token that follows; IGNORE_INDEX where there is no target
    target_tokens: int  # number of targets in the whole global batch of the optimizer step: all micro-batches and ranks
    indices: Tensor  # (B,) int64, position of each sequence in the (training or validation) set
    prompt_lengths: Tensor | None = None  # (B,) int64, pairs only: input_ids[b, :prompt_lengths[b]] is the prompt
    references: list[str] | None = None  # (B,) pairs only: the target text, for metrics on generated text
    by_student: bool = False  # whether the student itself wrote the text, so that its labels teach nothing


def pad_pairs(
    sequences: Sequence[tuple[Tensor, int]], indices: Tensor, *, target_tokens: int, context: int, pad_id: int
) -> Batch:
    """Pairs as one micro-batch, with labels on what follows the prompt.

    Args:
        sequences: B of (token ids of prompt and response (L,), length of the prompt).
        context: the most positions; T is the length of the longest pair, rounded up to a multiple of 8.
        indices, target_tokens: as in Batch.
    """
    longest = max(len(tokens) - 1 for tokens, _ in sequences)
    length = min(-(-longest // MULTIPLE) * MULTIPLE, context)
    input_ids = torch.full((len(sequences), length), pad_id, dtype=torch.int64)  # (B, T)
    labels = torch.full((len(sequences), length), IGNORE_INDEX, dtype=torch.int64)  # (B, T)
    for place, (tokens, prompt_length) in enumerate(sequences):
        input_ids[place, : len(tokens) - 1] = tokens[:-1]
        labels[place, prompt_length - 1 : len(tokens) - 1] = tokens[prompt_length:]
    prompt_lengths = torch.tensor([prompt_length for _, prompt_length in sequences])  # (B,)
    return Batch(input_ids, labels, target_tokens, indices, prompt_lengths)
