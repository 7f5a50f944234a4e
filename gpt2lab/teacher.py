"""Teacher: a frozen model as a signal for the LM-head loss."""

import torch
from torch import Tensor

from gpt2lab.backbone import Backbone, load_backbone
from gpt2lab.teacher_signal import DenseTeacher


class OnlineTeacher:
    """A loaded teacher. Not an nn.Module, so no optimizer, checkpoint or wrapper of the student ever takes it up.

    Args:
        source: run directory, Hugging Face folder or Hub id.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.backbone: Backbone = load_backbone(source).eval().requires_grad_(False)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the weights; a low-precision dtype spares casting them at every step."""
        self.backbone.to(device=device, dtype=dtype)

    @torch.no_grad()
    def signal(self, input_ids: Tensor) -> DenseTeacher:
        """(B, T) → hidden states (B·T, Dt) and head weight (V, Dt)."""
        self.backbone.eval()
        return self.backbone(input_ids, lambda hidden, weight: DenseTeacher(hidden.flatten(0, 1), weight))
