"""Exponential moving average of weights, to be swapped in for validation and export."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Keeps average ← decay · average + (1 − decay) · weight for each parameter, in the parameters' order and dtype."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self._update = get_ema_multi_avg_fn(decay)
        self._is_applied = False

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
        self._is_applied = not self._is_applied

    @contextmanager
    def applied(self) -> Iterator[None]:
        """In the block the parameters hold the averages, whether or not they already did."""
        was_applied = self._is_applied
        if not was_applied:
            self.swap()
        try:
            yield
        finally:
            if not was_applied:
                self.swap()

    def state(self, whole: bool = True) -> list[Tensor]:
        """What a checkpoint keeps. Where weights are sharded every rank must call it.

        Args:
            whole: gather sharded tensors.
        """
        if not whole:
            return list(self.averages)
        return [average.full_tensor() if isinstance(average, DTensor) else average for average in self.averages]

    @torch.no_grad()
    def load(self, averages: list[Tensor]) -> None:
        """Take up the averages of a checkpoint."""
        for mine, saved in zip(self.averages, averages, strict=True):
            saved = saved.to(mine.device)
            if isinstance(mine, DTensor) and not isinstance(saved, DTensor):
                saved = distribute_tensor(saved, mine.device_mesh, mine.placements)
            mine.copy_(saved)
