"""Interrupt: ends a run in good order on a signal or at another callback's request, between two optimizer steps.

SIGTERM and SIGUSR1 (a cluster wants its machine back) and the first Ctrl-C let the step in progress finish and a
checkpoint be saved; a second Ctrl-C stops at once. With several ranks all stop after the same step.
"""

import logging
import signal
import time
from datetime import timedelta
from types import FrameType
from typing import Any

import lightning
import torch.distributed
from lightning import Trainer

from gpt2lab.batch import Batch

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REASONS = ("", "SIGUSR1", "SIGTERM", "SIGINT", "loss spike")  # ranks exchange the index; the largest wins
SAME_KEY_PRESS = 0.5  # seconds: a terminal and a launcher may both deliver one Ctrl-C


class StoppedNowError(BaseException):
    """Second Ctrl-C. Not a KeyboardInterrupt, which Lightning turns into exit code 1."""


class Interrupt(lightning.Callback):
    """After the run, `reason` names what stopped it (one of REASONS), or is empty where nothing did.

    Args:
        rank_timeout: seconds after which a rank that waits for the others to agree gives up.
    """

    def __init__(self, rank_timeout: int = 1800) -> None:
        self.timeout = timedelta(seconds=rank_timeout)
        self.reason = ""
        self._request = ""
        self._first_press = 0.0
        self._previous: dict[int, Any] = {}
        self._ranks: torch.distributed.ProcessGroup | None = None

    def request(self, reason: str) -> None:
        """Ask for the run to end after the step in progress."""
        self._request = reason

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        # By now Lightning has set handlers of its own; its SIGTERM handler communicates in the middle of a step.
        self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        if trainer.world_size > 1:
            # A group on the CPU, so that agreeing does not wait for a GPU's queue.
            self._ranks = torch.distributed.new_group(backend="gloo", timeout=self.timeout)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        reason = self._agreed_reason()
        if reason and trainer.global_step < trainer.max_steps:
            log.warning("%s: stopping after step %d and saving.", reason, trainer.global_step)
            self.reason = reason
            if (batch_idx + 1) % trainer.val_check_batch:  # Lightning would validate whenever it is asked to stop
                trainer.limit_val_batches = 0
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: lightning.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()
        if isinstance(exception, StoppedNowError | KeyboardInterrupt):
            self.reason = "SIGINT"

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            pressed = time.monotonic()
            if self._first_press and pressed - self._first_press > SAME_KEY_PRESS:
                raise StoppedNowError
            self._first_press = self._first_press or pressed
        self._request = signal.Signals(number).name

    def _agreed_reason(self) -> str:
        if self._ranks is None:
            return self._request
        index = torch.tensor(REASONS.index(self._request))
        torch.distributed.all_reduce(index, torch.distributed.ReduceOp.MAX, group=self._ranks)
        return REASONS[int(index)]
