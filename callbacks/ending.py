"""Ending: status of a run at the end of its fit."""

from typing import Literal

from lightning import Trainer

from callbacks.best import find_best
from callbacks.interrupt import Interrupt
from callbacks.pruning import Pruning


def run_status(trainer: Trainer) -> Literal["finished", "stopped early", "stopped", "pruned"]:
    """Return the status of a run whose fit ended without an error.

    A fit that ends early by itself (a time limit, an added callback that sets `trainer.should_stop`) is finished, by
    early_stop_patience it is stopped early, which counts as finished; one that is ended by a signal or a loss spike is
    stopped and can be resumed.
    """
    if is_pruned(trainer):
        return "pruned"
    if stop_reason(trainer):
        return "stopped"
    return "stopped early" if find_best(trainer).has_stopped else "finished"


def stop_reason(trainer: Trainer) -> str:
    """Return the reason (signal or loss spike) that stopped the run; otherwise ""."""
    return next((callback.reason for callback in trainer.callbacks if isinstance(callback, Interrupt)), "")


def is_pruned(trainer: Trainer) -> bool:
    """Whether a search pruned the run; its last state is then not saved."""
    return any(callback.is_pruned for callback in trainer.callbacks if isinstance(callback, Pruning))
