"""Exponential moving average of weights, to be swapped in for validation and export."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Keeps average ← decay · average + (1 − decay) · weight for each parameter, in the parameters' order.

    Averages of weights in bf16 are fp32, in which alone they move by a thousandth of what is left; the model takes them
    rounded.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.averages = [_single(parameter).clone() for parameter in self.parameters]
        self._update = get_ema_multi_avg_fn(decay)
        self._weights: list[Tensor] = []  # while the model has the averages

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now; call once after each optimizer step."""
        self._update(self.averages, [_single(parameter) for parameter in self.parameters], None)

    @torch.no_grad()
    def swap(self) -> None:
        """Give the model the averages; a second call gives it its weights back."""
        if self._weights:
            for parameter, weight in zip(self.parameters, self._weights, strict=True):
                parameter.copy_(weight)
            self._weights = []
            return
        self._weights = [parameter.detach().clone() for parameter in self.parameters]
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.copy_(average)

    @property
    def is_applied(self) -> bool:
        """Whether the model has the averages."""
        return bool(self._weights)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """In the block the parameters hold the averages, whether or not they already did."""
        was_applied = self.is_applied
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


def _single(parameter: Tensor) -> Tensor:
    """Itself, or what is in bf16 as fp32."""
    return parameter.detach().float() if parameter.dtype == torch.bfloat16 else parameter.detach()
