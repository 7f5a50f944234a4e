"""Job queue: runs what a source proposes, as many jobs at once as an executor has room for, until nothing is left.

A job that is misconfigured, fails or is killed is recorded and the next one starts. A signal to this process goes to
every running job, nothing new starts, and the queue ends with the jobs. So it does after an error of its own, a study
that cannot be written or a full disk: the jobs that run are finished and recorded first. What runs the jobs is an
`Executor`: processes here, SLURM, or Ray.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from gpt2lab.errors import InputError
from launch import exit_codes
from launch.config.schema import RunConfig
from launch.distributed import child_processes
from launch.sweep.jobs import Job, conclude

POLL_SECONDS = 0.05

log = logging.getLogger(__name__)


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

    def start(self, config: RunConfig, number: int) -> RunningJob:
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
    prepared: Callable[[Job], RunConfig | None],
    changed: Callable[[Job], None],
) -> int:
    """Run to the end; returns the last signal that came, or 0.

    Args:
        planned: makes the job of a proposal.
        prepared: composes and checks it; None: it is recorded as failed, or as finished already.
        changed: called whenever a job has started or ended.

    Raises:
        Exception: the first that one of these raised, after the jobs that ran then have ended.
    """
    queue = _Queue(source, executor, planned, prepared, changed)
    with child_processes.noting() as signals:
        sent = 0
        while queue.running or not (queue.exhausted or queue.errors or signals):
            for number in signals[sent:]:
                queue.signal(number)
                sent += 1
            queue.record_ended()  # first: what is asked for next is to learn from it
            with queue.noting_errors():
                if not (queue.exhausted or queue.errors or signals) and executor.has_room():
                    queue.start_next()
                    continue
            if queue.running:
                time.sleep(POLL_SECONDS)
    if queue.errors:
        raise queue.errors[0]
    return signals[-1] if signals else 0


@dataclass
class _Queue:
    """The jobs that run, and what there is to do with them; arguments as of `run_all`."""

    source: Source
    executor: Executor
    planned: Callable[[Proposal], Job]
    prepared: Callable[[Job], RunConfig | None]
    changed: Callable[[Job], None]
    running: list[tuple[Job, RunningJob]] = field(default_factory=list)
    exhausted: bool = False
    errors: list[Exception] = field(default_factory=list)

    @contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Keep an error of the block for the end: who leaves now takes the running jobs along."""
        try:
            yield
        except Exception as error:
            if not self.errors and self.running:
                log.warning(
                    "No more jobs are started, those that run (%d) are finished first: %s",
                    len(self.running),
                    _in_one_line(error),
                )
            self.errors.append(error)

    def start_next(self) -> None:
        """Start the job that is next, or record why it is not run."""
        proposal = self.source.ask()
        if proposal is None:
            self.exhausted = True
            return
        job = self.planned(proposal)
        try:
            config = self.prepared(job)
            if config is not None:
                job.status = "running"
                self.changed(job)
                self.running.append((job, self.executor.start(config, job.number)))
                return
        except InputError as error:  # a cluster that refuses it
            conclude(job, exit_codes.MISTAKE, str(error))
        except Exception as error:
            self._record_unknown(job, error)
            raise
        self.changed(job)
        self.source.tell(job)

    def signal(self, number: int) -> None:
        """Send a signal to all jobs."""
        for _, process in self.running:
            with self.noting_errors():
                process.signal(number)

    def record_ended(self) -> None:
        """Record the jobs that have ended."""
        for job, process in list(self.running):
            with self.noting_errors():
                try:
                    ended = process.ended()
                    if ended is None:
                        continue
                    conclude(job, *ended)
                except Exception as error:
                    self.running.remove((job, process))
                    self._record_unknown(job, error)
                    raise
                self.running.remove((job, process))
                self.changed(job)
                self.source.tell(job)

    def _record_unknown(self, job: Job, error: Exception) -> None:
        """A job that could not be started, or of which nobody knows how it ended, goes on when the sweep does."""
        job.status, job.error = "stopped", _in_one_line(error)
        self.changed(job)


def _in_one_line(error: Exception) -> str:
    cause = error.__cause__ or error  # a database's own words say more than Optuna's
    return str(exit_codes.as_mistake(error) or f"{type(cause).__name__}: {cause}").splitlines()[0]
