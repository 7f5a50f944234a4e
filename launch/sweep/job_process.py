"""Job processes: each run of a sweep in its own process and session; LocalJobs is the executor for this machine."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import IO

from gpt2lab.storage.atomic_files import write_text
from launch import exit_codes
from launch.config import run_spec
from launch.config.machine import Slot
from launch.config.schema import RunConfig
from launch.distributed import child_processes
from launch.exit_codes import ERROR_FILE
from launch.sweep.executor import Executor


class JobProcess:
    """A run in a subprocess.

    Args:
        config: a checked configuration.
        slot: CPU cores and GPUs that it may use.
        output: file for its stdout; None: the stdout of this process.
        errors: file for its stderr; None: `output`.
    """

    def __init__(
        self, config: RunConfig, slot: Slot | None = None, output: Path | None = None, errors: Path | None = None
    ) -> None:
        self._start([config], slot or Slot(), output, errors)

    def _start(
        self,
        configs: Sequence[RunConfig],
        slot: Slot,
        output: Path | None = None,
        errors: Path | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        self._outcome: tuple[int, str] | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="gpt2lab-job-")
        files = [Path(self._scratch.name, f"config-{number:05}.yaml") for number in range(len(configs))]
        for file, config in zip(files, configs, strict=True):
            write_text(file, run_spec.to_yaml(config))
        self._file = files[0]
        cores = [] if slot.cores is None else ["--cores", ",".join(map(str, slot.cores))]
        allowed = ["--allow-targets", ",".join(configs[0].allow_targets)]  # the YAML does not contain them
        program = [sys.executable, "-P", "-m", "launch.run.job", str(self._file), str(os.getpid())]
        with ExitStack() as opened:
            stdout, stderr = (opened.enter_context(_open_for_append(file)) for file in (output, errors or output))
            self._process = subprocess.Popen(
                # -P: a folder `callbacks` in the working directory must not shadow this project's package.
                [*program, *flags, *cores, *allowed],
                env={**child_processes.environment(), **slot.environment()},
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        """Send a signal to the process if it still runs."""
        if self._process.poll() is None:
            child_processes.send(number, [self._process.pid])

    def wait(self) -> tuple[int, str]:
        """Wait for the end; return (exit code, error message or ""). A negative code is the signal that killed it."""
        self._process.wait()
        outcome = self.ended()
        assert outcome is not None
        return outcome

    def ended(self) -> tuple[int, str] | None:
        """Return (exit code, error message or ""), or None while it runs."""
        code = self._process.poll()
        if self._outcome is None and code is not None:
            error = self._file.with_name(ERROR_FILE)
            self._outcome = code, error.read_text(encoding="utf-8") if error.is_file() else ""
            self._scratch.cleanup()
        return self._outcome


class StartCheck(JobProcess):
    """A subprocess that finds a user error shared by all of these runs before their first step; its outcome's message.

    Args:
        configs: checked configurations.
        slot: CPU cores and GPUs that a run may use.
    """

    def __init__(self, configs: Sequence[RunConfig], slot: Slot) -> None:
        self._start(configs, slot, flags=["--check"])


def _open_for_append(file: Path | None) -> AbstractContextManager[IO[bytes] | None]:
    if file is None:
        return nullcontext()
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.open("ab")


class LocalJobs(Executor):
    """Executor that runs jobs on this machine, one per slot.

    Args:
        slots: partition of the machine's cores and GPUs.
        logs: folder for the output of parallel jobs.
    """

    def __init__(self, slots: list[Slot], logs: Path) -> None:
        super().__init__(len(slots), logs)
        self.is_parallel = len(slots) > 1
        self._slots: dict[Slot, JobProcess | None] = dict.fromkeys(slots)  # slot → its last job

    def submit(self, config: RunConfig, output: Path, errors: Path) -> JobProcess:
        """Start a job in a free slot; the only one prints to the stdout and stderr of this process."""
        slot = next(slot for slot, job in self._slots.items() if job is None or job.ended() is not None)
        files = (output, errors) if self.is_parallel else ()
        job = self._slots[slot] = JobProcess(config, slot, *files)
        return job

    def common_error(self, configs: Sequence[RunConfig]) -> str:
        """Return the error in a subprocess, so that this one needs neither torch nor a GPU."""
        check = StartCheck(configs, next(iter(self._slots)))
        with child_processes.forward_signals(check.signal) as signals:
            code, error = check.wait()
        if signals:
            raise exit_codes.Exit(exit_codes.signal_exit_code(signals[-1]), exit_codes.stop_message(signals[-1]))
        return error if code == exit_codes.FINISHED else ""

    def close(self) -> None:
        """No resources to release."""
