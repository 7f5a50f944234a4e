"""Hidden-state losses: distances between the last hidden states of student and teacher, as extra loss terms.

Shapes: N positions, Dt teacher's hidden width. `hidden` is the student's, projected to Dt.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2lab.settings import LossSettings


def hidden_state_distance(hidden: Tensor, teacher_hidden: Tensor, kept: Tensor, loss: LossSettings) -> Tensor:
    """Weighted sum of both distances over the kept positions: (N, Dt) twice, (N,) bool → ()."""
    total = hidden.new_zeros(())
    if loss.hidden_cosine:
        total = total + loss.hidden_cosine * cosine_distance(hidden, teacher_hidden, kept)
    if loss.hidden_mse:
        total = total + loss.hidden_mse * squared_distance(hidden, teacher_hidden, kept)
    return total


def cosine_distance(hidden: Tensor, teacher_hidden: Tensor, kept: Tensor) -> Tensor:
    """Sum of 1 − cos over the kept positions: (N, Dt) twice, (N,) bool → (). Source: DistilBERT (arXiv 1910.01108)."""
    cosine = F.cosine_similarity(hidden.float(), teacher_hidden.float(), dim=1)
    return torch.where(kept, 1 - cosine, 0.0).sum()


def squared_distance(hidden: Tensor, teacher_hidden: Tensor, kept: Tensor) -> Tensor:
    """Sum of the mean squared differences over the kept positions: (N, Dt) twice, (N,) bool → ()."""
    squares = (hidden.float() - teacher_hidden.float()).square().mean(1)
    return torch.where(kept, squares, 0.0).sum()
