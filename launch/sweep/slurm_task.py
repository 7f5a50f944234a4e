"""SlurmTask: what submitit calls on a machine that SLURM has given: the run, and signals to it."""

import os
import signal
from contextlib import suppress
from dataclasses import dataclass, replace
from types import FrameType

import submitit

from launch import exit_codes
from launch.distributed import child_processes
from launch.sweep.cluster_task import ClusterTask

TIME_IS_UP = signal.SIGUSR2  # submitit lets SLURM send it before the end of a job's time


@dataclass
class SlurmTask(ClusterTask):
    """Called once for each rank where SLURM starts all of them, else once.

    Attributes:
        is_requeued: whether submitit has requeued the job.
    """

    is_requeued: bool = False

    def __call__(self) -> tuple[int, str]:
        """(exit code, error it told) of the run; does not return where the job's time was up and it is queued again."""
        environment = submitit.JobEnvironment()
        environment.paths.result_pickle.unlink(missing_ok=True)  # of this job before it was queued again
        queue_again = signal.signal(TIME_IS_UP, signal.SIG_IGN)  # the run inherits it: SLURM may signal that too
        is_requeued = self.is_requeued or int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        process = self.start(environment.global_rank, is_requeued)
        time_is_up: list[int] = []

        def save(number: int, _frame: FrameType | None) -> None:
            time_is_up.append(number)
            process.signal(signal.SIGUSR1)

        signal.signal(TIME_IS_UP, save)
        with child_processes.forwarding(process.signal):
            code, told = process.wait()
        if code == exit_codes.STOPPED and time_is_up and callable(queue_again):
            with suppress(submitit.core.utils.UncompletedJobError):  # it was queued again as often as it may be
                queue_again(TIME_IS_UP, None)  # on the first rank it calls `checkpoint` and ends this process
        return code, told

    def checkpoint(self) -> submitit.core.utils.DelayedSubmission:
        """What submitit is to queue instead."""
        return submitit.helpers.DelayedSubmission(replace(self, is_requeued=True))
