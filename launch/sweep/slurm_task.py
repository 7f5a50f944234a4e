"""SlurmTask: the callable that submitit runs on a SLURM node; starts the run, forwards signals, requeues on timeout."""

import os
import signal
from contextlib import suppress
from dataclasses import dataclass, replace
from types import FrameType

import submitit

from launch import exit_codes
from launch.distributed import child_processes
from launch.sweep.cluster_task import ClusterTask

TIMEOUT_SIGNAL = signal.SIGUSR2  # SLURM sends it before the job's time limit, as configured through submitit


@dataclass
class SlurmTask(ClusterTask):
    """A run as a submitit callable: called once per rank in a multi-node run, otherwise once.

    Attributes:
        is_requeued: whether submitit has requeued the job.
    """

    is_requeued: bool = False

    def __call__(self) -> tuple[int, str]:
        """Run the job; return (exit code, error message or ""). Does not return if the job is requeued on timeout."""
        environment = submitit.JobEnvironment()
        environment.paths.result_pickle.unlink(missing_ok=True)  # from before the job was requeued
        requeue = signal.signal(TIMEOUT_SIGNAL, signal.SIG_IGN)  # the child inherits it: SLURM may signal it too
        is_requeued = self.is_requeued or int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        process = self.start(environment.global_rank, is_requeued)
        timeouts: list[int] = []

        def save(number: int, _frame: FrameType | None) -> None:
            timeouts.append(number)
            process.signal(signal.SIGUSR1)

        signal.signal(TIMEOUT_SIGNAL, save)
        with child_processes.forward_signals(process.signal):
            code, error = process.wait()
        if code == exit_codes.STOPPED and timeouts and callable(requeue):
            with suppress(submitit.core.utils.UncompletedJobError):  # `launcher.requeues` is exhausted
                requeue(TIMEOUT_SIGNAL, None)  # on rank 0: calls `checkpoint` and ends this process
        return code, error

    def checkpoint(self) -> submitit.core.utils.DelayedSubmission:
        """Return the task that submitit requeues."""
        return submitit.helpers.DelayedSubmission(replace(self, is_requeued=True))
