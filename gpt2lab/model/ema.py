"""Exponential moving average (EMA) of weights, swapped in for validation and export."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Average of each parameter: average ← decay · average + (1 − decay) · weight, in the parameters' order.

    Averages of bf16 weights are fp32, because bf16 would lose updates of a thousandth; `swap` rounds them to bf16.

    Args:
        after_swap: called after each swap; FSDP then drops weights that it gathered before.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], decay: float, after_swap: Callable[[], None] = lambda: None
    ) -> None:
        self.parameters = list(parameters)
        self.averages = [_detach(parameter).clone() for parameter in self.parameters]
        self._after_swap = after_swap
        self._update = get_ema_multi_avg_fn(decay)
        self._weights: list[Tensor] = []  # the model's weights while the averages are swapped in

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages with the current weights; call it once after each optimizer step."""
        self._update(self.averages, [_detach(parameter) for parameter in self.parameters], None)

    @torch.no_grad()
    def swap(self) -> None:
        """Copy the averages into the model; a second call restores its weights."""
        if self._weights:
            copied, self._weights = self._weights, []
        else:
            self._weights = [parameter.detach().clone() for parameter in self.parameters]
            copied = self.averages
        for parameter, weight in zip(self.parameters, copied, strict=True):
            parameter.copy_(weight)
        self._after_swap()

    @property
    def is_applied(self) -> bool:
        """Whether the model contains the averages."""
        return bool(self._weights)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the averages in for the block, unless they already are."""
        was_applied = self.is_applied
        if not was_applied:
            self.swap()
        try:
            yield
        finally:
            if not was_applied:
                self.swap()

    def state(self, whole: bool = True) -> list[Tensor]:
        """Return the averages for a checkpoint; collective if weights are sharded.

        Args:
            whole: whether to gather sharded tensors.
        """
        if not whole:
            return list(self.averages)
        return [average.full_tensor() if isinstance(average, DTensor) else average for average in self.averages]

    @torch.no_grad()
    def load(self, averages: list[Tensor]) -> None:
        """Load the averages of a checkpoint."""
        for mine, saved in zip(self.averages, averages, strict=True):
            saved = saved.to(mine.device)
            if isinstance(mine, DTensor) and not isinstance(saved, DTensor):
                saved = distribute_tensor(saved, mine.device_mesh, mine.placements)
            mine.copy_(saved)


def stored_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict of `Backbone.lm` in a whole checkpoint: its averaged weights if it has an average."""
    prefix = "backbone.lm."
    state = dict(checkpoint["state_dict"])
    dtype = state[f"{prefix}transformer.wte.weight"].dtype  # averages may be in fp32
    for name, average in zip(checkpoint.get("averaged", []), checkpoint.get("weight_average", []), strict=True):
        state[f"backbone.{name}"] = average.to(dtype)
    weights = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {**weights, "lm_head.weight": weights["transformer.wte.weight"]}  # tied


def _detach(parameter: Tensor) -> Tensor:
    """Return the detached parameter, bf16 as fp32."""
    return parameter.detach().float() if parameter.dtype == torch.bfloat16 else parameter.detach()
