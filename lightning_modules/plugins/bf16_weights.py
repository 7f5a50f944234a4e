"""Half weights: Lightning's bf16-true, except that only the model's weights are made bf16."""

from typing import Literal

import torch
from lightning.pytorch.plugins import Precision
from torch import nn


class Bf16Weights(Precision):
    """Weights, and with them gradients and what is computed of them, in bf16.

    Lightning's own makes bf16 also PyTorch's default type, in which a count of 4,095 targets is 4,096 and first weights
    are others than those of the same seed in fp32; and it rounds what a batch holds, a stored teacher's probabilities.
    """

    precision: Literal["bf16-true"] = "bf16-true"

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module.to(torch.bfloat16)
