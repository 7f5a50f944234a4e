"""StopRequest: a request to end the run early, which long work checks between its parts together with other ranks."""

from typing import Any

import torch
import torch.distributed
from transformers.generation.streamers import BaseStreamer

LOSS_SPIKE = "loss spike"
REASONS = ("", LOSS_SPIKE, "SIGUSR1", "SIGTERM", "SIGINT")  # ranks exchange the index; the largest wins


class Interrupted(Exception):
    """A signal ended a validation or a generation before it was complete."""


class StopRequest:
    """One rank's request and, through `agreed`, that of all ranks.

    Attributes:
        reason: one of REASONS; empty: no request.
        ranks: process group in which the ranks agree; None: there is one rank. It is on the CPU, so that agreeing does
            not wait for a GPU's queue.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.ranks: torch.distributed.ProcessGroup | None = None

    def agreed(self) -> str:
        """Return the reason that all ranks act on; every rank must call it."""
        if self.ranks is None:
            return self.reason
        index = torch.tensor(REASONS.index(self.reason))
        torch.distributed.all_reduce(index, torch.distributed.ReduceOp.MAX, group=self.ranks)
        return REASONS[int(index)]

    def check(self) -> None:
        """End work that can be repeated; every rank must call it.

        Raises:
            Interrupted: on every rank, where one of them received a signal.
        """
        if is_urgent(self.agreed()):
            raise Interrupted

    def between_tokens(self) -> BaseStreamer:
        """Streamer that ends a generation on this rank alone; its caller then calls `check`."""
        return _BetweenTokens(self)


def is_urgent(reason: str) -> bool:
    """Whether the reason is a signal, after which a cluster may kill the process within seconds."""
    return reason not in ("", LOSS_SPIKE)


class _BetweenTokens(BaseStreamer):
    def __init__(self, request: StopRequest) -> None:
        self._request = request

    def put(self, value: Any) -> None:
        if is_urgent(self._request.reason):
            raise Interrupted

    def end(self) -> None:
        """Nothing is held back."""
