"""Remote run: submits a single run through `launcher=slurm` or `launcher=ray`, shows its output, returns its result."""

import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import IO

from gpt2lab.storage.report_json import read_report, watched_value
from launch import exit_codes
from launch.config import run_dir
from launch.config.multirun_settings import LauncherSettings
from launch.config.schema import RunConfig
from launch.distributed import child_processes
from launch.sweep.executor import Executor
from launch.sweep.job_queue import POLL_SECONDS


def create_executor(launcher: LauncherSettings, max_jobs: int, logs: Path) -> Executor:
    """Create the SLURM or Ray executor.

    Args:
        max_jobs: limit on submitted jobs that have not ended.
        logs: folder for the output of jobs.

    Raises:
        InputError: the package or the cluster is not available.
    """
    if launcher.name == "slurm":
        from launch.sweep.slurm import SlurmJobs

        return SlurmJobs(launcher, max_jobs, logs)
    from launch.sweep.ray import RayJobs

    return RayJobs(launcher, max_jobs, logs)


def run(config: RunConfig) -> float | None:
    """Submit a run, print its output until it ends, and return the watched metric.

    Raises:
        InputError: the run cannot be submitted.
        exit_codes.Exit: the run did not finish; `code` is its exit code.
    """
    config, folder, created = _with_folder(config)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{config.launcher.name}-", dir=folder.absolute().parent) as scratch:
            files = Path(scratch, "output.txt"), Path(scratch, "errors.txt")
            code, error = _submit_and_follow(config, files)
            is_shown = files[1].is_file() and error in files[1].read_text(encoding="utf-8", errors="replace")
    finally:
        run_dir.remove_empty(created)
    if code:
        message = error or (f"The run in {folder} was killed by {signal.Signals(-code).name}." if code < 0 else "")
        raise exit_codes.Exit(max(code, exit_codes.FAILED), "" if is_shown and error else message)
    return watched_value(read_report(folder))


def _with_folder(config: RunConfig) -> tuple[RunConfig, Path, list[Path]]:
    """Fix the run directory, so that a requeued job finds it; return (configuration, directory, created folders)."""
    if config.resume not in (None, "auto"):
        return config, Path(str(config.resume)).expanduser(), []
    if config.resume == "auto":
        folder = run_dir.run_folder(config)
        created = run_dir.missing_folders(folder)
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder, created = run_dir.reserve(config)
    return (replace(config, run_dir=str(folder)) if config.name is None else config), folder, created


def _submit_and_follow(config: RunConfig, files: tuple[Path, Path]) -> tuple[int, str]:
    """Submit the run and copy its stdout and stderr until it ends; return (exit code, error message or "")."""
    executor = create_executor(config.launcher, max_jobs=1, logs=files[0].parent)
    offsets = [0, 0]

    def show() -> None:
        for index, (file, stream) in enumerate(zip(files, (sys.stdout, sys.stderr), strict=True)):
            offsets[index] += _copy_new(file, offsets[index], stream)

    with child_processes.record_signals() as signals:
        job, sent, ended = executor.submit(config, *files), 0, None
        while ended is None:
            time.sleep(POLL_SECONDS)
            for number in signals[sent:]:
                job.signal(number)
                sent += 1
            ended = job.ended()
            show()
    executor.close()
    return ended


def _copy_new(file: Path, start: int, stream: IO[str]) -> int:
    """Copy the bytes from `start` on to the stream; return their number."""
    if not file.exists():
        return 0
    with file.open("rb") as opened:
        opened.seek(start)
        added = opened.read()
    stream.write(added.decode("utf-8", errors="replace"))
    stream.flush()
    return len(added)
