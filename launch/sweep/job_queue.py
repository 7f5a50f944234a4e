"""Job queue: runs the jobs that a source proposes, in parallel on an executor (local processes, SLURM or Ray).

A job that is misconfigured, fails or is killed is recorded, and the next one starts. After a signal or an internal
error, such as a full disk, no more jobs start; the queue forwards the signal, waits for the running jobs and records
them.
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
from launch.sweep.executor import Executor, RunningJob
from launch.sweep.jobs import Job, record_end

POLL_SECONDS = 0.05

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Proposal:
    """The overrides of the next job.

    Attributes:
        trial: Optuna trial number, which is also the job number; None: jobs are counted.
        failed: error of this job before the sweep was resumed; it is recorded again and not run.
    """

    overrides: list[str]
    trial: int | None = None
    failed: str = ""


class Source(Protocol):
    """Source of jobs: a grid, or a search that depends on earlier results (ask-and-tell interface)."""

    @property
    def total(self) -> int:
        """Number of jobs, of a search at most."""

    def ask(self) -> Proposal | None:
        """Return the next job, or None after the last one."""

    def tell(self, job: Job) -> None:
        """Receive the status and the watched metric of an ended job."""


class JobList:
    """A source with a fixed list of jobs."""

    def __init__(self, combinations: Sequence[list[str]]) -> None:
        self._left = [Proposal(overrides) for overrides in combinations]
        self.total = len(self._left)

    def ask(self) -> Proposal | None:
        return self._left.pop(0) if self._left else None

    def tell(self, job: Job) -> None:
        """Ignore the result."""


@dataclass
class JobQueue:
    """The jobs of a source, run on an executor.

    Attributes:
        create_job: creates the job of a proposal.
        prepare: composes and checks its configuration; returns None for a job that it has recorded as failed or as
            already finished.
        on_change: called after a job has started or ended.
        on_wait: called from time to time while jobs run.
    """

    source: Source
    executor: Executor
    create_job: Callable[[Proposal], Job]
    prepare: Callable[[Job], RunConfig | None]
    on_change: Callable[[Job], None]
    on_wait: Callable[[], None] = lambda: None
    running: list[tuple[Job, RunningJob]] = field(default_factory=list)
    exhausted: bool = False
    errors: list[Exception] = field(default_factory=list)

    def run(self) -> int:
        """Run all jobs; return the last received signal, or 0.

        Raises:
            Exception: the first error of the source, the executor or a callback, after all running jobs have ended.
        """
        with child_processes.record_signals() as signals:
            sent = 0
            while self.running or not (self.exhausted or self.errors or signals):
                for number in signals[sent:]:
                    self.signal(number)
                    sent += 1
                self.record_ended()  # before the next `ask`, which depends on the results
                with self.defer_errors():
                    if not (self.exhausted or self.errors or signals) and self.executor.has_free_slot():
                        self.start_next()
                        continue
                if self.running:
                    self.on_wait()
                    time.sleep(POLL_SECONDS)
        if self.errors:
            raise self.errors[0]
        return signals[-1] if signals else 0

    @contextmanager
    def defer_errors(self) -> Iterator[None]:
        """Store an error of the block until all jobs have ended: running jobs would die with this process."""
        try:
            yield
        except Exception as error:
            if not self.errors and self.running:
                log.warning(
                    "No more jobs are started, those that run (%d) are finished first: %s",
                    len(self.running),
                    _first_line(error),
                )
            self.errors.append(error)

    def start_next(self) -> None:
        """Start the next job, or record why it cannot run."""
        proposal = self.source.ask()
        if proposal is None:
            self.exhausted = True
            return
        job = self.create_job(proposal)
        try:
            config = self.prepare(job)
            if config is not None:
                job.status = "running"
                self.on_change(job)
                self.running.append((job, self.executor.start(config, job.number)))
                return
        except InputError as error:  # the cluster rejects the job
            record_end(job, exit_codes.USER_ERROR, str(error))
        except Exception as error:
            self._record_stopped(job, error)
            raise
        self.on_change(job)
        self.source.tell(job)

    def signal(self, number: int) -> None:
        """Send a signal to all jobs."""
        for _, process in self.running:
            with self.defer_errors():
                process.signal(number)

    def record_ended(self) -> None:
        """Record the jobs that have ended."""
        for job, process in list(self.running):
            with self.defer_errors():
                try:
                    ended = process.ended()
                    if ended is None:
                        continue
                    record_end(job, *ended)
                except Exception as error:
                    self.running.remove((job, process))
                    self._record_stopped(job, error)
                    raise
                self.running.remove((job, process))
                self.on_change(job)
                self.source.tell(job)

    def _record_stopped(self, job: Job, error: Exception) -> None:
        """Record a job that could not start, or whose result is unknown; a resumed sweep runs it again."""
        job.status, job.error = "stopped", _first_line(error)
        self.on_change(job)


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error  # the database's message is more specific than Optuna's
    return str(exit_codes.as_input_error(error) or f"{type(cause).__name__}: {cause}").splitlines()[0]
