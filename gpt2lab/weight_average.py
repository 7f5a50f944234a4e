"""Exponential moving average of weights, to be swapped in for validation and export."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Keeps average ← decay · average + (1 − decay) · weight for each parameter, in the parameters' order and dtype."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self._update = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now; call once after each optimizer step."""
        self._update(self.averages, [parameter.detach() for parameter in self.parameters], None)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages; a second call undoes it."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            weight = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weight)

    def state(self) -> list[Tensor]:
        """What a checkpoint keeps."""
        return self.averages

    @torch.no_grad()
    def load(self, averages: list[Tensor]) -> None:
        """Take up the averages of a checkpoint."""
        for mine, saved in zip(self.averages, averages, strict=True):
            mine.copy_(saved)
