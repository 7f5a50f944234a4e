"""Distances between the last hidden states of student and teacher, as further terms of a distillation loss.

Shapes: N positions, D the student's hidden width, Dt the teacher's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_distance(hidden: Tensor, teacher_hidden: Tensor, kept: Tensor) -> Tensor:
    """Σ (1 − cos) over the kept positions: (N, Dt) twice, (N,) bool → (). Source: DistilBERT (arXiv 1910.01108)."""
    cosine = F.cosine_similarity(hidden.float(), teacher_hidden.float(), dim=1)
    return torch.where(kept, 1 - cosine, 0.0).sum()


def squared_distance(hidden: Tensor, teacher_hidden: Tensor, kept: Tensor) -> Tensor:
    """Σ mean squared difference over the kept positions: (N, Dt) twice, (N,) bool → ()."""
    squares = (hidden.float() - teacher_hidden.float()).square().mean(1)
    return torch.where(kept, squares, 0.0).sum()
