"""Ending: the status that the end of a fit gives its run."""

from typing import Literal

from lightning import Trainer

from callbacks.interrupt import Interrupt
from callbacks.pruning import Pruning


def status_of(trainer: Trainer) -> Literal["finished", "stopped", "pruned"]:
    """The status of a run whose fit ended without an error.

    A fit that ends before its last step by itself (early stopping, a time limit, a callback that sets
    `trainer.should_stop`) is finished; one that a signal or a loss spike ended is stopped, to be resumed.
    """
    if is_pruned(trainer):
        return "pruned"
    return "stopped" if stop_reason(trainer) else "finished"


def stop_reason(trainer: Trainer) -> str:
    """The signal or the loss spike that stopped the run; empty where nothing did."""
    return next((callback.reason for callback in trainer.callbacks if isinstance(callback, Interrupt)), "")


def is_pruned(trainer: Trainer) -> bool:
    """Whether a search ended the run early, of which nothing is saved for that reason."""
    return any(callback.is_pruned for callback in trainer.callbacks if isinstance(callback, Pruning))
