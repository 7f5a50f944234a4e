"""Distances between the last hidden states of student and teacher, as extra terms of a distillation loss.

Shapes: N positions, D the student's hidden width, Dt the teacher's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2lab.settings import LossSettings


def hidden_state_distance(hidden: Tensor, teacher_hidden: Tensor, kept: Tensor, loss: LossSettings) -> Tensor:
    """Σ over the kept positions of both distances by their weights in `loss`: (N, Dt) twice, (N,) bool → ()."""
    total = hidden.new_zeros(())
    if loss.hidden_cosine:
        total = total + loss.hidden_cosine * cosine_distance(hidden, teacher_hidden, kept)
    if loss.hidden_mse:
        total = total + loss.hidden_mse * squared_distance(hidden, teacher_hidden, kept)
    return total


def cosine_distance(hidden: Tensor, teacher_hidden: Tensor, kept: Tensor) -> Tensor:
    """Σ (1 − cos) over the kept positions: (N, Dt) twice, (N,) bool → (). Source: DistilBERT (arXiv 1910.01108)."""
    cosine = F.cosine_similarity(hidden.float(), teacher_hidden.float(), dim=1)
    return torch.where(kept, 1 - cosine, 0.0).sum()


def squared_distance(hidden: Tensor, teacher_hidden: Tensor, kept: Tensor) -> Tensor:
    """Σ mean squared difference over the kept positions: (N, Dt) twice, (N,) bool → ()."""
    squares = (hidden.float() - teacher_hidden.float()).square().mean(1)
    return torch.where(kept, squares, 0.0).sum()
