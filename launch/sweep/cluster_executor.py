"""ClusterJobs: what the executors of SLURM and Ray share: how many jobs are out, and where what they print is kept."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TypeVar

from launch.config.schema import RunConfig
from launch.sweep.job_queue import RunningJob

Started = TypeVar("Started", bound=RunningJob)


class ClusterJobs(ABC):
    """Hands runs over to other machines.

    Args:
        at_once: jobs that may be out at the same time.
        logs: folder for what jobs print; all machines see it.
    """

    several = True

    def __init__(self, at_once: int, logs: Path) -> None:
        self._at_once, self._logs = at_once, logs
        self._out: list[RunningJob] = []

    def has_room(self) -> bool:
        """Whether another job may be handed over now."""
        self._out = [job for job in self._out if job.ended() is None]
        return len(self._out) < self._at_once

    def start(self, config: RunConfig, number: int) -> RunningJob:
        """Hand over a run of a sweep."""
        log = self._logs / f"job-{number}.txt"
        return self.submit(config, log, log)

    @abstractmethod
    def submit(self, config: RunConfig, output: Path, errors: Path) -> RunningJob:
        """Hand over a run whose output goes to these files.

        Raises:
            InputError: the cluster refuses it.
        """

    @abstractmethod
    def close(self) -> None:
        """No more runs come."""

    def _noted(self, job: Started) -> Started:
        self._out.append(job)
        return job
