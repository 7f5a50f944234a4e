"""Job processes: each run of a sweep in its own process and session; LocalJobs is the executor for this machine."""

import os
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import IO

from gpt2lab.storage.atomic_files import write_text
from launch.config import run_spec
from launch.config.machine import Slot
from launch.config.schema import RunConfig
from launch.distributed import child_processes
from launch.exit_codes import ERROR_FILE


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
        self.slot = slot = slot or Slot()
        self._scratch = tempfile.TemporaryDirectory(prefix="gpt2lab-job-")
        self._file = Path(self._scratch.name, "config.yaml")
        write_text(self._file, run_spec.to_yaml(config))
        cores = [] if slot.cores is None else ["--cores", ",".join(map(str, slot.cores))]
        allowed = ["--allow-targets", ",".join(config.allow_targets)]  # the YAML does not contain them
        with ExitStack() as opened:
            stdout, stderr = (opened.enter_context(_open_for_append(file)) for file in (output, errors or output))
            self._process = subprocess.Popen(
                # -P: a folder `callbacks` in the working directory must not shadow this project's package.
                [sys.executable, "-P", "-m", "launch.run.job", str(self._file), str(os.getpid()), *cores, *allowed],
                env={**child_processes.environment(), **slot.environment()},
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        """Send a signal to the process if it still runs."""
        if self.is_running:
            child_processes.send(number, [self._process.pid])

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended yet."""
        return self._process.poll() is None

    def wait(self) -> tuple[int, str]:
        """Wait for the end; return (exit code, error message or ""). A negative code is the signal that killed it."""
        return self._outcome(self._process.wait())

    def ended(self) -> tuple[int, str] | None:
        """Return (exit code, error message or ""), or None while it runs."""
        code = self._process.poll()
        return None if code is None else self._outcome(code)

    def _outcome(self, code: int) -> tuple[int, str]:
        error = self._file.with_name(ERROR_FILE)
        message = error.read_text(encoding="utf-8") if error.is_file() else ""
        self._scratch.cleanup()
        return code, message


def _open_for_append(file: Path | None) -> AbstractContextManager[IO[bytes] | None]:
    if file is None:
        return nullcontext()
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.open("ab")


class LocalJobs:
    """Executor that runs jobs on this machine, one per slot.

    Args:
        slots: partition of the machine's cores and GPUs.
        logs: folder for the output of parallel jobs.
    """

    def __init__(self, slots: list[Slot], logs: Path) -> None:
        self.is_parallel = len(slots) > 1
        self._slots = slots
        self._logs = logs
        self._started: list[JobProcess] = []

    def has_free_slot(self) -> bool:
        """Whether another job can start now."""
        return len(self._running()) < len(self._slots)

    def start(self, config: RunConfig, number: int) -> JobProcess:
        """Start a job in a free slot."""
        taken = [process.slot for process in self._running()]
        slot = next(slot for slot in self._slots if slot not in taken)
        output = self._logs / f"job-{number}.txt" if self.is_parallel else None
        self._started = [*self._running(), JobProcess(config, slot, output)]
        return self._started[-1]

    def close(self) -> None:
        """No resources to release."""

    def _running(self) -> list[JobProcess]:
        return [process for process in self._started if process.is_running]
