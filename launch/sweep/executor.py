"""Executor: base class of what starts the jobs of a sweep, here, on SLURM or on Ray; limits how many run at once."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from launch.config.schema import RunConfig


class RunningJob(Protocol):
    """A started job, on this or another machine."""

    def signal(self, number: int) -> None:
        """Send a signal to the job's processes; cancel the job if it is still pending."""

    def ended(self) -> tuple[int, str] | None:
        """Return (exit code, error message or ""), or None while it runs."""


class Executor(ABC):
    """Starts jobs.

    Args:
        max_jobs: limit on started jobs that have not ended.
        logs: folder for the output of jobs, shared by all machines.
    """

    is_parallel = True  # whether several jobs run at once, so that their output goes to files

    def __init__(self, max_jobs: int, logs: Path) -> None:
        self.max_jobs, self._logs = max_jobs, logs
        self._running: list[RunningJob] = []

    def has_free_slot(self) -> bool:
        """Whether another job may start now."""
        self._running = [job for job in self._running if job.ended() is None]
        return len(self._running) < self.max_jobs

    def start(self, config: RunConfig, number: int) -> RunningJob:
        """Start a job of a sweep."""
        log = self._logs / f"job-{number}.txt"
        job = self.submit(config, log, log)
        self._running.append(job)
        return job

    @abstractmethod
    def submit(self, config: RunConfig, output: Path, errors: Path) -> RunningJob:
        """Start a run; its stdout and stderr go to these files.

        Raises:
            InputError: the cluster rejects the job.
        """

    def common_error(self, configs: Sequence[RunConfig]) -> str:
        """Return the user error with which all of these runs would end before their first step; "" if none is known."""
        return ""  # other machines may have other files and devices

    @abstractmethod
    def close(self) -> None:
        """Release resources after all jobs have ended."""
