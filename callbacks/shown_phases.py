"""Shown phases: bars of the phases of a run, if the run shows its progress."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning import Trainer

from gpt2lab.system.terminal import Phase


class ShowsPhases:
    """Base class of the callback that shows progress; without it a run has no bars."""


def shows_phases(trainer: Trainer) -> bool:
    """Whether this process shows the phases of the run: rank 0, with a callback for progress."""
    return trainer.is_global_zero and any(isinstance(callback, ShowsPhases) for callback in trainer.callbacks)


@contextmanager
def shown_phase(trainer: Trainer, title: str, total: int | None = None) -> Iterator[Phase]:
    """Show a bar while the block runs, if the run shows its phases."""
    phase = Phase(title, total)
    if not shows_phases(trainer):
        yield phase
        return
    with phase:
        yield phase
