"""ClusterJobs: base class of the SLURM and Ray executors; limits the number of submitted jobs and names log files."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TypeVar

from launch.config.schema import RunConfig
from launch.sweep.job_queue import RunningJob

Started = TypeVar("Started", bound=RunningJob)


class ClusterJobs(ABC):
    """Executor that submits jobs to a cluster.

    Args:
        max_jobs: limit on submitted jobs that have not ended.
        logs: folder for the output of jobs, shared by all machines.
    """

    is_parallel = True

    def __init__(self, max_jobs: int, logs: Path) -> None:
        self._max_jobs, self._logs = max_jobs, logs
        self._submitted: list[RunningJob] = []

    def has_free_slot(self) -> bool:
        """Whether another job may be submitted now."""
        self._submitted = [job for job in self._submitted if job.ended() is None]
        return len(self._submitted) < self._max_jobs

    def start(self, config: RunConfig, number: int) -> RunningJob:
        """Submit a job of a sweep."""
        log = self._logs / f"job-{number}.txt"
        return self.submit(config, log, log)

    @abstractmethod
    def submit(self, config: RunConfig, output: Path, errors: Path) -> RunningJob:
        """Submit a run; its stdout and stderr go to these files.

        Raises:
            InputError: the cluster rejects the job.
        """

    @abstractmethod
    def close(self) -> None:
        """Release resources after the last job."""

    def _track(self, job: Started) -> Started:
        self._submitted.append(job)
        return job
