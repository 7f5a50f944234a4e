"""Job queue: runs what a source proposes, as many jobs at once as an executor has room for, until nothing is left.

A job that is misconfigured, fails or is killed is recorded and the next one starts. A signal to this process goes to
every running job, nothing new starts, and the queue ends with the jobs. What runs the jobs is an `Executor`: processes
here, SLURM, or Ray.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gpt2lab.errors import InputError
from launch import answer
from launch.configuration.config import Config
from launch.running import children
from launch.running.jobs import Job, conclude

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Proposal:
    """What the next job is to be.

    Attributes:
        trial: its number, in a study that may end it early; None: jobs are counted.
        failed: why it failed, where it did so before the sweep was taken up again, and is not run again.
    """

    overrides: list[str]
    trial: int | None = None
    failed: str = ""


class Source(Protocol):
    """Where jobs come from: a grid, or a search that learns from what became of earlier ones."""

    def ask(self) -> Proposal | None:
        """The next job; None: there are no more."""

    def tell(self, job: Job) -> None:
        """What became of a job: its status, its watched metric."""


class RunningJob(Protocol):
    """A job that was started, here or on another machine."""

    def signal(self, number: int) -> None:
        """Send it a signal, as to a process; one that has not begun is withdrawn."""

    def ended(self) -> tuple[int, str] | None:
        """(exit code, error it told) once it has ended."""


class Executor(Protocol):
    """Where jobs run."""

    several: bool  # whether jobs run at once, so that their output goes to files

    def has_room(self) -> bool:
        """Whether another job can start now."""

    def start(self, settings: Config, number: int) -> RunningJob:
        """Start a job."""

    def close(self) -> None:
        """Let go of what is held beside the jobs, all of which have ended."""


class Listed:
    """A source of jobs that are known from the start."""

    def __init__(self, combinations: Sequence[list[str]]) -> None:
        self._left = [Proposal(overrides) for overrides in combinations]

    def ask(self) -> Proposal | None:
        return self._left.pop(0) if self._left else None

    def tell(self, job: Job) -> None:
        """A list learns nothing."""


def run_all(
    source: Source,
    executor: Executor,
    planned: Callable[[Proposal], Job],
    prepared: Callable[[Job], Config | None],
    changed: Callable[[Job], None],
) -> int:
    """Run to the end; returns the last signal that came, or 0.

    Args:
        planned: makes the job of a proposal.
        prepared: composes and checks it; None: it is recorded as failed, or as finished already.
        changed: called whenever a job has started or ended.
    """
    running: list[tuple[Job, RunningJob]] = []
    with children.noting() as signals:
        exhausted, sent = False, 0
        while running or not (exhausted or signals):
            while executor.has_room() and not (exhausted or signals):
                proposal = source.ask()
                if proposal is None:
                    exhausted = True
                    break
                job = planned(proposal)
                settings = prepared(job)
                if settings is None:
                    changed(job)
                    source.tell(job)
                    continue
                job.status = "running"
                changed(job)
                try:
                    running.append((job, executor.start(settings, job.number)))
                except InputError as error:  # a cluster that refuses it
                    conclude(job, answer.MISTAKE, str(error))
                    changed(job)
                    source.tell(job)
            for number in signals[sent:]:
                for _, process in running:
                    process.signal(number)
                sent += 1
            for job, process in list(running):
                ended = process.ended()
                if ended is None:
                    continue
                running.remove((job, process))
                conclude(job, *ended)
                changed(job)
                source.tell(job)
            if running:
                time.sleep(POLL_SECONDS)
    return signals[-1] if signals else 0
