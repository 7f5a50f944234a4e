"""StopRequest: a request to end the run early, checked by all ranks between the parts of long work."""

from typing import Any

import torch
import torch.distributed
from transformers.generation.streamers import BaseStreamer

LOSS_SPIKE = "loss spike"
REASONS = ("", LOSS_SPIKE, "SIGUSR1", "SIGTERM", "SIGINT")  # ranks exchange the index; the largest wins


class Interrupted(Exception):
    """A signal ended a validation or a generation before it was complete."""


class StopRequest:
    """Request of one rank and, through `agree`, of all ranks.

    Attributes:
        reason: one of REASONS; empty: no request.
        ranks: process group of the ranks; None: a single rank. It is a CPU group, so that `agree` does not wait for
            a GPU's queue.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.ranks: torch.distributed.ProcessGroup | None = None

    def agree(self) -> str:
        """Return the same reason on all ranks; collective."""
        if self.ranks is None:
            return self.reason
        index = torch.tensor(REASONS.index(self.reason))
        torch.distributed.all_reduce(index, torch.distributed.ReduceOp.MAX, group=self.ranks)
        return REASONS[int(index)]

    def check(self) -> None:
        """End work that can be repeated, if a rank received a signal; collective.

        Raises:
            Interrupted: on every rank.
        """
        if is_urgent(self.agree()):
            raise Interrupted

    def streamer(self) -> BaseStreamer:
        """Return a streamer that interrupts generation on this rank only; its caller then informs the other ranks."""
        return _InterruptingStreamer(self)


def is_urgent(reason: str) -> bool:
    """Whether the reason is a signal, after which a cluster may kill the process within seconds."""
    return reason not in ("", LOSS_SPIKE)


class _InterruptingStreamer(BaseStreamer):
    def __init__(self, request: StopRequest) -> None:
        self._request = request

    def put(self, value: Any) -> None:
        if is_urgent(self._request.reason):
            raise Interrupted

    def end(self) -> None:
        """Do nothing: no token is buffered."""
