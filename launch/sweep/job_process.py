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
        slot = slot or Slot()
        self._outcome: tuple[int, str] | None = None
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

    def close(self) -> None:
        """No resources to release."""
