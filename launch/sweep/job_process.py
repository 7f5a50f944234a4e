"""JobProcess: a run in a process and session of its own, watched from here; and the slots such processes run in."""

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
from launch.run.job import ERROR_FILE


class JobProcess:
    """A started run.

    Args:
        config: a checked configuration.
        slot: the cores and GPUs it may use.
        output: a file for what it prints; None: this process's own terminal.
        errors: a file for its stderr; None: with the rest.
    """

    def __init__(
        self, config: RunConfig, slot: Slot | None = None, output: Path | None = None, errors: Path | None = None
    ) -> None:
        self.slot = slot = slot or Slot()
        self._scratch = tempfile.TemporaryDirectory(prefix="gpt2lab-job-")
        self._file = Path(self._scratch.name, "config.yaml")
        write_text(self._file, run_spec.to_yaml(config))
        cores = [] if slot.cores is None else ["--cores", ",".join(map(str, slot.cores))]
        allowed = ["--allow-targets", ",".join(config.allow_targets)]  # a stored configuration holds none
        with ExitStack() as opened:
            stdout, stderr = (opened.enter_context(_appending(file)) for file in (output, errors or output))
            self._process = subprocess.Popen(
                # -P: a folder `callbacks` in the working directory must not take the place of this project's.
                [sys.executable, "-P", "-m", "launch.run.job", str(self._file), str(os.getpid()), *cores, *allowed],
                env={**child_processes.environment(), **slot.environment()},
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.is_running:
            child_processes.send(number, [self._process.pid])

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended yet."""
        return self._process.poll() is None

    def wait(self) -> tuple[int, str]:
        """(exit code, the error it told or nothing) at its end; a negative code is the signal that killed it."""
        return self._outcome(self._process.wait())

    def ended(self) -> tuple[int, str] | None:
        """As `wait`; None while it runs."""
        code = self._process.poll()
        return None if code is None else self._outcome(code)

    def _outcome(self, code: int) -> tuple[int, str]:
        error = self._file.with_name(ERROR_FILE)
        told = error.read_text(encoding="utf-8") if error.is_file() else ""
        self._scratch.cleanup()
        return code, told


def _appending(file: Path | None) -> AbstractContextManager[IO[bytes] | None]:
    if file is None:
        return nullcontext()
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.open("ab")


class LocalJobs:
    """Runs jobs on this machine, as many at once as there are slots.

    Args:
        slots: where they run.
        logs: folder for what jobs print when several run at once.
    """

    def __init__(self, slots: list[Slot], logs: Path) -> None:
        self.several = len(slots) > 1
        self._slots = slots
        self._logs = logs
        self._started: list[JobProcess] = []

    def has_room(self) -> bool:
        """Whether another job can start now."""
        return len(self._running()) < len(self._slots)

    def start(self, config: RunConfig, number: int) -> JobProcess:
        """Start a job in a free slot."""
        taken = [process.slot for process in self._running()]
        slot = next(slot for slot in self._slots if slot not in taken)
        output = self._logs / f"job-{number}.txt" if self.several else None
        self._started = [*self._running(), JobProcess(config, slot, output)]
        return self._started[-1]

    def close(self) -> None:
        """Nothing is held."""

    def _running(self) -> list[JobProcess]:
        return [process for process in self._started if process.is_running]
