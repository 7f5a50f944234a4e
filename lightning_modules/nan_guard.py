"""FiniteWatch: ends a run whose loss or gradient is NaN or infinite, before its weights are used."""

import math

import torch
from torch import Tensor

from gpt2lab.errors import RunError
from gpt2lab.system.device import AsyncScalar


class NonFiniteLossError(RunError):
    """The loss or its gradient became NaN or infinite; the message names the step and the sequences of the batch."""


class FiniteWatch:
    """Check of one value per step, the loss or its gradient norm, one step later, without a GPU synchronization.

    Logging, validation, saving, export and generation call `check` first.
    """

    def __init__(self) -> None:
        self._watched: AsyncScalar | None = None
        self._step = 0
        self._indices: list[Tensor] = []

    def note(self, number: Tensor, step: int, indices: list[Tensor]) -> None:
        """Record a step.

        Args:
            number: () loss, or norm of its gradient.
            indices: sequences of its micro-batches.
        """
        self._watched, self._step, self._indices = AsyncScalar(number), step, indices

    def check(self) -> None:
        """Check the last recorded step.

        Raises:
            NonFiniteLossError: its value is not finite; the weights may not be finite either.
        """
        watched, self._watched = self._watched, None
        if watched is not None and not math.isfinite(watched.read()):
            raise NonFiniteLossError(
                f"the loss or its gradient is not finite at step {self._step}, "
                f"batch of sequences {torch.cat(self._indices).tolist()}.\n"
                "Lower optimizer.lr, lengthen schedule.warmup_steps, or use precision=fp32."
            )
