"""SLURM: SlurmJobs submits runs with submitit and polls their result files and squeue; SlurmTask runs on the nodes."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from gpt2lab.errors import InputError
from launch import exit_codes
from launch.checks import resource_request
from launch.checks.resource_request import Machines
from launch.config.multirun_settings import LauncherSettings
from launch.config.schema import RunConfig
from launch.distributed import child_processes
from launch.sweep.cluster_task import ClusterTask
from launch.sweep.executor import Executor

TIMEOUT_SIGNAL = signal.SIGUSR2  # SLURM sends it before the job's time limit, as configured through submitit
FILE_POLL_SECONDS = 1.0  # interval of checks for the result files of a job
SQUEUE_SECONDS = 5.0  # interval of squeue calls, for all jobs together
FILE_LAG_SECONDS = 15.0  # delay with which files of an ended job may appear on a shared file system
TRACEBACK_RULE = "-" * 22  # submitit prints it before and after a traceback
PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
ACTIVE = (*PENDING, "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT")


class SlurmQueue:
    """States of this user's SLURM jobs, cached for a few seconds."""

    def __init__(self) -> None:
        self._queried = 0.0
        self._states: dict[str, str] | None = None

    def state(self, job_id: str) -> str:
        """Return RUNNING, TIMEOUT, …; "" if squeue fails, GONE if squeue does not list the job."""
        if time.monotonic() - self._queried > SQUEUE_SECONDS:
            self._queried, self._states = time.monotonic(), self._query()
        return "" if self._states is None else self._states.get(job_id, "GONE")

    def _query(self) -> dict[str, str] | None:
        command = ["squeue", "--me", "--states=all", "--noheader", "--format=%A %T"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            return None
        return dict(line.split() for line in done.stdout.splitlines() if len(line.split()) == 2)


class SlurmJob:
    """A submitted job.

    Args:
        job: the job object of submitit.
        queue: job states; None: submitit runs the job in local processes.
    """

    def __init__(self, job: Any, queue: SlurmQueue | None) -> None:
        self.job = job
        self._queue = queue
        self._polled = time.monotonic()
        self._inactive_since: float | None = None
        self._signalled = 0
        self._outcome: tuple[int, str] | None = None

    def signal(self, number: int) -> None:
        """Send a signal to all processes of the job; cancel it if it is still pending."""
        if self.ended() is not None:
            return
        self._signalled = number
        if self._queue is None:
            child_processes.send(signal.SIGTERM, [int(self.job.job_id)])  # submitit forwards no other signal
            return
        name = signal.Signals(number).name.removeprefix("SIG")
        for flags in (["--state=PENDING"], [f"--signal={name}"]):
            subprocess.run(["scancel", *flags, self.job.job_id], capture_output=True, check=False)

    def ended(self) -> tuple[int, str] | None:
        """Return (exit code, error message or ""), or None while the job runs or is requeued."""
        if self._outcome is None and time.monotonic() - self._polled > FILE_POLL_SECONDS:
            self._polled = time.monotonic()
            self._outcome = self._poll()
        return self._outcome

    def _poll(self) -> tuple[int, str] | None:
        results = [self._result(number) for number in range(self.job.num_tasks)]
        outcomes = [outcome for outcome in results if outcome is not None]
        is_complete = len(outcomes) == len(results)
        if is_complete and outcomes[0][0] not in (exit_codes.STOPPED, exit_codes.INTERRUPTED):
            return _combine(outcomes)
        state = str(self.job.state) if self._queue is None else self._queue.state(self.job.job_id)
        if state in ("", *ACTIVE):
            self._inactive_since = None
            return None
        if is_complete:
            return _combine(outcomes)
        self._inactive_since = self._inactive_since or time.monotonic()
        if time.monotonic() - self._inactive_since < (FILE_LAG_SECONDS if self._queue else FILE_POLL_SECONDS):
            return None
        if self._signalled:
            return exit_codes.signal_exit_code(self._signalled), ""
        return exit_codes.FAILED, self._lost_message(state)

    def _result(self, task: int) -> tuple[int, str] | None:
        part = self.job.task(task)
        if not part.paths.result_pickle.exists():
            return None
        error = part.exception()
        if error is None:
            return part.result()
        return exit_codes.FAILED, str(error).split(TRACEBACK_RULE)[1].strip().splitlines()[-1]

    def _lost_message(self, state: str) -> str:
        """Message for a job without result files: its SLURM state and the last line of its stderr."""
        message = f"job {self.job.job_id} ended without a result: {state}"
        errors = self.job.paths.stderr
        lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines() if errors.is_file() else []
        return f"{message} ({lines[-1]})" if lines else message


@dataclass
class SlurmTask(ClusterTask):
    """A run as a submitit callable: called once per rank in a multi-node run, otherwise once.

    Attributes:
        is_requeued: whether submitit has requeued the job.
    """

    is_requeued: bool = False

    def __call__(self) -> tuple[int, str]:
        """Run the job; return (exit code, error message or ""). Does not return if the job is requeued on timeout."""
        import submitit

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

    def checkpoint(self) -> Any:
        """Return the task that submitit requeues."""
        import submitit

        return submitit.helpers.DelayedSubmission(replace(self, is_requeued=True))


def _combine(outcomes: list[tuple[int, str]]) -> tuple[int, str]:
    """Outcome of a job from those of its ranks: that of a killed rank, of a user error, otherwise of rank 0."""
    killed = [outcome for outcome in outcomes if outcome[0] < 0]
    user_errors = [outcome for outcome in outcomes if outcome[0] == exit_codes.USER_ERROR]
    return [*killed, *user_errors, outcomes[0]][0]


class SlurmJobs(Executor):
    """Executor that submits runs with submitit; its files are in `logs` until `close`.

    Args:
        launcher: how to submit; the resource request is in the settings of each job.

    Raises:
        InputError: submitit or sbatch is not installed.
    """

    def __init__(self, launcher: LauncherSettings, max_jobs: int, logs: Path) -> None:
        if find_spec("submitit") is None:
            raise InputError("launcher=slurm needs submitit.\nInstall it: .venv/bin/pip install 'submitit>=1.5'")
        if launcher.executor == "slurm" and shutil.which("sbatch") is None:
            raise InputError(
                "launcher=slurm: sbatch is not installed on this machine.\n"
                "Start the command on a login node of the cluster, or test it with launcher.executor=local."
            )
        super().__init__(max_jobs, logs)
        logs.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="submitted-", dir=logs))  # a new one: submitit unpickles its files
        self._queue = SlurmQueue() if launcher.executor == "slurm" else None

    def submit(self, config: RunConfig, output: Path, errors: Path) -> SlurmJob:
        """Submit a run; its stdout and stderr go to these files.

        Raises:
            InputError: SLURM rejects the job.
        """
        os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")  # by default submitit closes all log handlers
        import submitit
        from submitit.core.core import PicklingExecutor

        machines = resource_request.request_from(config)
        launcher = config.launcher
        kind: type[PicklingExecutor]
        if self._queue is None:
            kind, parameters = submitit.LocalExecutor, _local_parameters(launcher, machines)
        else:
            kind, parameters = submitit.SlurmExecutor, _parameters(launcher, machines, config.run_dir or "")
        executor = kind(self._folder, max_num_timeout=launcher.requeues)
        executor.update_parameters(**parameters)
        try:
            with _environment(is_local=self._queue is None):
                job = SlurmJob(executor.submit(SlurmTask(config, output, errors)), self._queue)
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(f"SLURM rejected the job: {reason}\nChange launcher.* or devices and num_nodes.") from None
        if self._queue is not None:
            print(f"{config.run_dir or config.resume}: SLURM job {job.job.job_id}", file=sys.stderr, flush=True)
        return job

    def close(self) -> None:
        """Remove submitit's files."""
        if all(job.ended() is not None for job in self._running):
            shutil.rmtree(self._folder, ignore_errors=True)


def _parameters(launcher: LauncherSettings, machines: Machines, name: str) -> dict[str, Any]:
    """sbatch options by submitit's names. SLURM starts all ranks of a multi-node run, otherwise one process per job."""
    tasks_per_node = machines.devices if machines.nodes > 1 else 1
    optional = {
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "mem_gb": launcher.memory,
        "gpus_per_node": machines.gpus or None,
        "setup": launcher.setup or None,
        "srun_args": ["--kill-on-bad-exit=1"] if machines.nodes > 1 else None,
    }
    return {
        "job_name": "-".join(Path(name).parts[-2:]) or "gpt2lab",
        "time": launcher.time,
        "signal_delay_s": launcher.notice,
        "nodes": machines.nodes,
        "ntasks_per_node": tasks_per_node,
        "cpus_per_task": launcher.cpus * machines.devices // tasks_per_node,
        "additional_parameters": {"requeue": True, **launcher.sbatch},
        **{key: value for key, value in optional.items() if value is not None},
    }


def _local_parameters(launcher: LauncherSettings, machines: Machines) -> dict[str, Any]:
    return {
        "timeout_min": launcher.time,
        "signal_delay_s": launcher.notice,
        "gpus_per_node": machines.gpus,
        "setup": tuple(launcher.setup),
    }


@contextmanager
def _environment(is_local: bool) -> Iterator[None]:
    """Set the environment in which a job is submitted: the project's PYTHONPATH, the signal before a timeout.

    A local job also ignores SIGINT: this process forwards a Ctrl-C, which would otherwise reach the job twice.
    """
    changed = {**child_processes.module_path(), "SUBMITIT_PREEMPT_SIGNAL": "USR2"}
    previous = {key: os.environ.get(key) for key in changed}
    os.environ |= changed
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_local else None
    try:
        yield
    finally:
        if is_local:
            signal.signal(signal.SIGINT, handler)
        for key, value in previous.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
