"""A callback that sends a signal to the process that has started the ranks, as a user or a scheduler does."""

import os
import signal
import time
from typing import Any

import lightning


class SignalParent(lightning.Callback):
    """Sends SIGTERM from rank 0 to its parent process after `steps` steps, and waits until it comes back."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, *_unused: Any) -> None:
        request = pl_module.stop_request
        if trainer.global_rank == 0 and trainer.global_step == self.steps and not request.reason:
            os.kill(os.getppid(), signal.SIGTERM)
            while not request.reason:
                time.sleep(0.01)
