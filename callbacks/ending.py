"""Ending: status of a run at the end of its fit."""

from typing import Literal

from lightning import Trainer

from callbacks.interrupt import Interrupt
from callbacks.pruning import Pruning


def run_status(trainer: Trainer) -> Literal["finished", "stopped", "pruned"]:
    """Return the status of a run whose fit ended without an error.

    A fit that ends early by itself (early stopping, a time limit, a callback that sets `trainer.should_stop`) is
    finished; one that is ended by a signal or a loss spike is stopped and can be resumed.
    """
    if is_pruned(trainer):
        return "pruned"
    return "stopped" if stop_reason(trainer) else "finished"


def stop_reason(trainer: Trainer) -> str:
    """Return the reason (signal or loss spike) that stopped the run; otherwise ""."""
    return next((callback.reason for callback in trainer.callbacks if isinstance(callback, Interrupt)), "")


def is_pruned(trainer: Trainer) -> bool:
    """Whether a search pruned the run; its last state is then not saved."""
    return any(callback.is_pruned for callback in trainer.callbacks if isinstance(callback, Pruning))
