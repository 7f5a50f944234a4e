"""Batch: what a data module hands to a training or validation step.

Shapes: B sequences of one micro-batch on one rank, T positions each.
"""

from dataclasses import dataclass

from torch import Tensor

IGNORE_INDEX = -100


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
