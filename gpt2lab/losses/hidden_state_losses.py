"""Hidden-state losses: distances between the last hidden states of student and teacher, as extra loss terms.

Shapes: N positions, Dt teacher's hidden width. `hidden` is the student's, projected to Dt.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2lab.settings import LossSettings


def hidden_state_distance(hidden: Tensor, teacher_hidden: Tensor, kept: Tensor, loss: LossSettings) -> Tensor:
    """Weighted sum of 1 − cos and of mean squared differences over the kept positions: (N, Dt) twice, (N,) bool → ().

    Source: the cosine distance is that of DistilBERT (arXiv 1910.01108).
    """
    total, student, teacher = hidden.new_zeros(()), hidden.float(), teacher_hidden.float()
    if loss.hidden_cosine:
        distances = 1 - F.cosine_similarity(student, teacher, dim=1)
        total = total + loss.hidden_cosine * torch.where(kept, distances, 0.0).sum()
    if loss.hidden_mse:
        squares = (student - teacher).square().mean(1)
        total = total + loss.hidden_mse * torch.where(kept, squares, 0.0).sum()
    return total
