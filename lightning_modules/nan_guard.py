"""FiniteWatch: ends a run whose loss or gradient is NaN or infinite, before anything is made of its weights."""

import math

import torch
from torch import Tensor

from gpt2lab.errors import RunError
from gpt2lab.system.device import AsyncScalar


class NonFiniteLossError(RunError):
    """The loss or its gradient became NaN or infinite; the message names the step and the sequences of the batch."""


class FiniteWatch:
    """Told of every step, it looks at a step when asked: training asks one step later, so that no GPU has to be waited
    for, and logging, validation, saving, export and generation check it first.
    """

    def __init__(self) -> None:
        self._watched: AsyncScalar | None = None
        self._step = 0
        self._indices: list[Tensor] = []

    def note(self, number: Tensor, step: int, indices: list[Tensor]) -> None:
        """A step was computed.

        Args:
            number: () that is finite where all is well: the loss, or the norm of its gradient.
            indices: of the sequences of its micro-batches.
        """
        self._watched, self._step, self._indices = AsyncScalar(number), step, indices

    def check(self) -> None:
        """Look at the step that was noted last.

        Raises:
            NonFiniteLossError: it was not finite; by now the weights may not be either.
        """
        watched, self._watched = self._watched, None
        if watched is not None and not math.isfinite(watched.read()):
            raise NonFiniteLossError(
                f"the loss or its gradient is not finite at step {self._step}, "
                f"batch of sequences {torch.cat(self._indices).tolist()}.\n"
                "Lower optimizer.lr, lengthen schedule.warmup_steps, or use precision=fp32."
            )
