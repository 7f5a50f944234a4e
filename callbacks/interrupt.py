"""Interrupt: ends a run in good order on a signal or at another callback's request.

SIGTERM, SIGUSR1 (a cluster reclaims its machine) and the first Ctrl-C end the run after the step in progress, or
between two batches of a validation, and a checkpoint is saved; a second Ctrl-C ends it at once. With several ranks all
stop at the same place. The resumed run repeats a validation that was cut short.
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
from gpt2lab.system.stop_request import Interrupted, StopRequest, is_urgent

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
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
        self._request = StopRequest()
        self._first_press = 0.0
        self._previous: dict[int, Any] = {}
        self._max_steps = -1

    def request(self, reason: str) -> None:
        """Ask for the run to end after the next step; a signal that has arrived takes precedence."""
        self._request.reason = self._request.reason or reason

    def setup(self, trainer: Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._max_steps = trainer.max_steps
        # Before Lightning sets handlers of its own, of which that of SIGTERM waits for the other ranks.
        self._previous = {number: signal.getsignal(number) for number in SIGNALS}
        pl_module.stop_request = self._request
        trainer.fit_loop.epoch_loop.val_loop = StoppableValidation(
            trainer, lambda: self._stop_validation(trainer, pl_module)
        )

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Where only the final validation is left, Lightning would skip the whole fit, and with it that validation.
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
        reason = self._request.agreed()
        if reason and trainer.global_step < trainer.max_steps:
            self.stop_after_step(trainer, pl_module, reason)

    def stop_after_step(self, trainer: Trainer, pl_module: lightning.LightningModule, reason: str) -> None:
        """End the run after the step just made; a validation that is due then is left to the resumed run."""
        log.warning("%s: stopping after step %d and saving.", reason, trainer.global_step)
        self.reason = reason
        is_last, batches = trainer.global_step >= trainer.max_steps, trainer.fit_loop.epoch_loop.total_batch_idx + 1
        pl_module.validation_is_due = is_last or batches % trainer.val_check_batch == 0
        if is_urgent(reason) or not pl_module.validation_is_due:  # Lightning validates whenever it is asked to stop
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
        self._request.check()  # all ranks have equally many batches

    def _stop_validation(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self.reason = self._request.agreed()
        log.warning("%s: stopping in the validation after step %d and saving.", self.reason, trainer.global_step)
        trainer.should_stop = True
        pl_module.abandon_validation()  # `Checkpoint` saves at the end of training what is not saved yet

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


class StoppableValidation(_EvaluationLoop):
    """Lightning's validation loop within a fit; `Interrupted`, raised in one of its hooks, ends it without a result.

    Args:
        on_stop: called then, with the module in training mode again.
    """

    def __init__(self, trainer: Trainer, on_stop: Callable[[], None]) -> None:
        super().__init__(trainer, TrainerFn.FITTING, RunningStage.VALIDATING, verbose=False, inference_mode=False)
        self._data_source = trainer.fit_loop.epoch_loop.val_loop._data_source  # of the loop that this one replaces
        self._on_stop = on_stop

    def run(self) -> list[Any]:
        """Validate; return nothing where the validation is cut short."""
        try:
            return super().run()
        except Interrupted:
            self.batch_progress.reset()
            self._on_evaluation_model_train()
            self.trainer._logger_connector.reset_results()
            self._on_stop()
            return []
