"""A callback that sends a signal to its run, as a user or a scheduler does, without a process that watches the run."""

import os
import signal
import time
from typing import Any

import lightning


class StopSignal(lightning.Callback):
    """Sends a signal after `steps` steps and waits until the run has it.

    Args:
        number: of the signal.
        to_parent: rank 0 sends it to the process that has started the ranks, otherwise to itself.
    """

    def __init__(self, steps: int, number: int = signal.SIGTERM, to_parent: bool = False) -> None:
        self.steps, self.number, self.to_parent = steps, number, to_parent

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, *_unused: Any) -> None:
        request = pl_module.stop_request
        if trainer.global_rank == 0 and trainer.global_step == self.steps and not request.reason:
            os.kill(os.getppid() if self.to_parent else os.getpid(), self.number)
            while not request.reason:
                time.sleep(0.01)


def stop_keys(**arguments: Any) -> list[str]:
    """Overrides that add the callback to a run."""
    given = {"_target_": "tests.support.stop_signal.StopSignal", **arguments}
    return [f"+callbacks.stop.{name}={value}" for name, value in given.items()]
