"""Interrupt: stop a run on a signal or at another callback's request, and save.

SIGTERM, SIGUSR1 (sent by clusters before the time limit) and the first Ctrl-C stop the run after the current step, or
between two validation batches, and a checkpoint is saved; a second Ctrl-C ends it at once. All ranks stop at the same
step. The resumed run repeats an interrupted validation.
"""

import logging
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any

import lightning
import torch.distributed
from lightning import Trainer
from lightning.pytorch.loops import _EvaluationLoop
from lightning.pytorch.trainer.states import RunningStage, TrainerFn

from gpt2lab.data.batch import Batch
from gpt2lab.system.heartbeat import GRACE_SECONDS
from gpt2lab.system.stop_request import Interrupted, StopRequest, is_urgent

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME_KEY_PRESS = 0.5  # seconds: a terminal and a launcher may both deliver one Ctrl-C


class StoppedNowError(BaseException):
    """Second Ctrl-C. Not a KeyboardInterrupt, for which Lightning exits with code 1."""


class Interrupt(lightning.Callback):
    """Signal handlers and the stop request; after the run `reason` is one of REASONS, "" if it was not stopped.

    Args:
        rank_timeout: seconds after which a rank is late; the agreement of the ranks times out a little later.
    """

    def __init__(self, rank_timeout: int = 1800) -> None:
        self.timeout = timedelta(seconds=rank_timeout + GRACE_SECONDS)
        self.reason = ""
        self._request = StopRequest()
        self._first_press = 0.0
        self._previous: dict[int, Any] = {}
        self._max_steps = -1

    def request(self, reason: str) -> None:
        """Request the run to stop after the next step; a received signal takes precedence."""
        self._request.reason = self._request.reason or reason

    def setup(self, trainer: Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._max_steps = trainer.max_steps
        self._previous = {number: signal.getsignal(number) for number in SIGNALS}
        pl_module.stop_request = self._request
        loop = trainer.fit_loop.epoch_loop
        loop.val_loop = StoppableValidation(trainer, lambda: self._stop_validation(trainer, pl_module))
        # Lightning's ranks exchange a received SIGTERM before every micro-batch, for which they wait for their GPUs
        loop._broadcast_sigterm_tensor = _nothing
        trainer._signal_connector.register_signal_handlers = _nothing  # that of SIGTERM waits for this exchange

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # If only the final validation is left, Lightning would skip the fit including that validation.
        if pl_module.validation_is_due and checkpoint["global_step"] >= trainer.max_steps:
            trainer.fit_loop.epoch_loop.max_steps = checkpoint["global_step"] + 1

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        trainer.fit_loop.epoch_loop.max_steps = self._max_steps
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        if trainer.world_size > 1:
            self._request.ranks = torch.distributed.new_group(backend="gloo", timeout=self.timeout)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        reason = self._request.agree()
        if reason and trainer.global_step < trainer.max_steps:
            self.stop_after_step(trainer, pl_module, reason)

    def stop_after_step(self, trainer: Trainer, pl_module: lightning.LightningModule, reason: str) -> None:
        """Stop the run after the current step; the resumed run makes a validation that is due."""
        log.warning("%s: stopping after step %d and saving.", reason, trainer.global_step)
        self.reason = reason
        is_last, batches = trainer.global_step >= trainer.max_steps, trainer.fit_loop.epoch_loop.total_batch_idx + 1
        pl_module.validation_is_due = is_last or batches % trainer.val_check_batch == 0
        if is_urgent(reason) or not pl_module.validation_is_due:  # Lightning validates whenever should_stop is set
            trainer.limit_val_batches = 0
        trainer.should_stop = True

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: lightning.LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._request.check()  # all ranks have the same number of batches

    def _stop_validation(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self.reason = self._request.agree()
        log.warning("%s: stopping in the validation after step %d and saving.", self.reason, trainer.global_step)
        trainer.should_stop = True
        pl_module.abandon_validation()  # `Checkpoint` then saves at the end of training

    def on_fit_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
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
        self._request.reason = signal.Signals(number).name


def _nothing() -> None:
    """Do nothing: `StopRequest.agree` exchanges signals, after each step and between CPUs."""


class StoppableValidation(_EvaluationLoop):
    """Validation loop within a fit that ends without a result if a hook raises `Interrupted`.

    Args:
        on_stop: called after such an end, with the module in training mode again.
    """

    def __init__(self, trainer: Trainer, on_stop: Callable[[], None]) -> None:
        super().__init__(trainer, TrainerFn.FITTING, RunningStage.VALIDATING, verbose=False, inference_mode=False)
        self._data_source = trainer.fit_loop.epoch_loop.val_loop._data_source  # from the loop that this one replaces
        self._on_stop = on_stop

    def run(self) -> list[Any]:
        """Validate; return an empty list if the validation is interrupted."""
        try:
            return super().run()
        except Interrupted:
            self.batch_progress.reset()
            self._on_evaluation_model_train()
            self.trainer._logger_connector.reset_results()
            self._on_stop()
            return []
