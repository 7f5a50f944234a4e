"""SlurmJobs: runs as SLURM jobs, submitted by submitit and watched from here by the files they leave and by squeue."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpt2lab.errors import InputError
from launch import exit_codes
from launch.checks import resource_request
from launch.checks.resource_request import Machines
from launch.config.multirun_settings import LauncherSettings
from launch.config.schema import RunConfig
from launch.distributed import child_processes
from launch.sweep.cluster_executor import ClusterJobs

LOOK_SECONDS = 1.0  # between looks for the files of a job
QUEUE_SECONDS = 5.0  # between questions to SLURM, for all jobs together
FILES_LAG = 15.0  # seconds after a job's end in which a shared file system may still hold its files back
TRACE_RULE = "-" * 22  # submitit's, around the traceback of what it called
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
ALIVE = (*WAITING, "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT")


class SlurmQueue:
    """What SLURM says of this user's jobs, asked at most every few seconds."""

    def __init__(self) -> None:
        self._asked = 0.0
        self._listed: dict[str, str] | None = None

    def state(self, job_id: str) -> str:
        """RUNNING, TIMEOUT, …; empty where SLURM does not answer, GONE where it no longer knows the job."""
        if time.monotonic() - self._asked > QUEUE_SECONDS:
            self._asked, self._listed = time.monotonic(), self._ask()
        return "" if self._listed is None else self._listed.get(job_id, "GONE")

    def _ask(self) -> dict[str, str] | None:
        command = ["squeue", "--me", "--states=all", "--noheader", "--format=%A %T"]
        try:
            answered = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            return None
        return dict(line.split() for line in answered.stdout.splitlines() if len(line.split()) == 2)


class SlurmJob:
    """A submitted run.

    Args:
        job: submitit's.
        queue: of SLURM; None: submitit's own processes on this machine.
    """

    def __init__(self, job: Any, queue: SlurmQueue | None) -> None:
        self.job = job
        self._queue = queue
        self._looked = time.monotonic()
        self._over_since: float | None = None
        self._signalled = 0
        self._outcome: tuple[int, str] | None = None

    def signal(self, number: int) -> None:
        """Send a signal to all its processes; a job that still waits is withdrawn."""
        if self.ended() is not None:
            return
        self._signalled = number
        if self._queue is None:
            child_processes.send(signal.SIGTERM, [int(self.job.job_id)])  # which submitit hands on, as it does no other
            return
        name = signal.Signals(number).name.removeprefix("SIG")
        for flags in (["--state=PENDING"], [f"--signal={name}"]):
            subprocess.run(["scancel", *flags, self.job.job_id], capture_output=True, check=False)

    def ended(self) -> tuple[int, str] | None:
        """(exit code, error it told) once it has ended and will not be queued again."""
        if self._outcome is None and time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            self._outcome = self._look()
        return self._outcome

    def _look(self) -> tuple[int, str] | None:
        outcomes = [self._told_by(number) for number in range(self.job.num_tasks)]
        told = [outcome for outcome in outcomes if outcome is not None]
        if len(told) == len(outcomes) and told[0][0] not in (exit_codes.STOPPED, exit_codes.INTERRUPTED):
            return _of_all_ranks(told)
        state = self._state()
        if state in ("", *ALIVE):
            self._over_since = None
            return None
        if len(told) == len(outcomes):
            return _of_all_ranks(told)
        self._over_since = self._over_since or time.monotonic()
        if time.monotonic() - self._over_since < (FILES_LAG if self._queue else LOOK_SECONDS):
            return None
        if self._signalled:
            return exit_codes.code_of_signal(self._signalled), ""
        return exit_codes.FAILED, self._why_lost(state)

    def _told_by(self, task: int) -> tuple[int, str] | None:
        part = self.job.task(task)
        if not part.paths.result_pickle.exists():
            return None
        error = part.exception()
        if error is None:
            return part.result()
        return exit_codes.FAILED, str(error).split(TRACE_RULE)[1].strip().splitlines()[-1]

    def _state(self) -> str:
        return str(self.job.state) if self._queue is None else self._queue.state(self.job.job_id)

    def _why_lost(self, state: str) -> str:
        """What SLURM says of a job that left no word, and the last line on its stderr."""
        said = f"job {self.job.job_id} ended without a word: {state}"
        errors = self.job.paths.stderr
        lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines() if errors.is_file() else []
        return f"{said} ({lines[-1]})" if lines else said


def _of_all_ranks(outcomes: list[tuple[int, str]]) -> tuple[int, str]:
    """A rank that was killed, or that found a mistake, says why the others failed; else the first speaks for all."""
    killed = [outcome for outcome in outcomes if outcome[0] < 0]
    mistaken = [outcome for outcome in outcomes if outcome[0] == exit_codes.MISTAKE]
    return [*killed, *mistaken, outcomes[0]][0]


class SlurmJobs(ClusterJobs):
    """Submits runs; `logs` holds submitit's files too, which are removed in the end.

    Args:
        launcher: how to reach SLURM; what a job asks for stands in its own settings.

    Raises:
        InputError: there is no SLURM here, or no submitit.
    """

    def __init__(self, launcher: LauncherSettings, at_once: int, logs: Path) -> None:
        if find_spec("submitit") is None:
            raise InputError("launcher=slurm needs submitit.\nInstall it: .venv/bin/pip install 'submitit>=1.5'")
        if launcher.executor == "slurm" and shutil.which("sbatch") is None:
            raise InputError(
                "launcher=slurm: there is no sbatch here, so jobs cannot be submitted.\n"
                "Start this on a login node of the cluster, or try things out with launcher.executor=local."
            )
        super().__init__(at_once, logs)
        logs.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="submitted-", dir=logs))  # a new one: submitit reads pickles there
        self._queue = SlurmQueue() if launcher.executor == "slurm" else None

    def submit(self, config: RunConfig, output: Path, errors: Path) -> SlurmJob:
        """Submit a run whose output goes to these files.

        Raises:
            InputError: SLURM refuses it.
        """
        os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")  # else it closes all other libraries' log handlers
        import submitit
        from submitit.core.core import PicklingExecutor

        from launch.sweep.slurm_task import SlurmTask

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
            with _environment(is_here=self._queue is None):
                job = SlurmJob(executor.submit(SlurmTask.from_config(config, output, errors)), self._queue)
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            said = str(error).strip().splitlines()[-1]
            raise InputError(f"SLURM refuses this job: {said}\nChange launcher.* or what the run asks for.") from None
        if self._queue is not None:
            print(f"{config.run_dir or config.resume}: SLURM job {job.job.job_id}", file=sys.stderr, flush=True)
        return self._noted(job)

    def close(self) -> None:
        """Remove submitit's files."""
        if all(job.ended() is not None for job in self._out):
            shutil.rmtree(self._folder, ignore_errors=True)


def _parameters(launcher: LauncherSettings, machines: Machines, name: str) -> dict[str, Any]:
    """For sbatch, by submitit's names. On several machines SLURM starts all ranks, on one the run does so itself."""
    ranks_here = machines.devices if machines.nodes > 1 else 1
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
        "ntasks_per_node": ranks_here,
        "cpus_per_task": launcher.cpus * machines.devices // ranks_here,
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
def _environment(is_here: bool) -> Iterator[None]:
    """What is submitted finds this project's modules, and here is deaf to the terminal's Ctrl-C, which this process
    hands on itself."""
    search = {"PYTHONPATH": child_processes.environment()["PYTHONPATH"], "PYTHONSAFEPATH": "1"}
    changed = {**search, "SUBMITIT_PREEMPT_SIGNAL": "USR2"}
    previous = {key: os.environ.get(key) for key in changed}
    os.environ |= changed
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_here else None
    try:
        yield
    finally:
        if is_here:
            signal.signal(signal.SIGINT, handler)
        for key, value in previous.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
