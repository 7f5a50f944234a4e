"""Elsewhere: where `launcher=` has runs done, and one run that is handed over, followed, and ends as it ends there."""

import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import IO

from gpt2lab.reports.run_report import read_report, watched_value
from launch import exit_codes
from launch.config import run_dir
from launch.config.multirun_settings import LauncherSettings
from launch.config.schema import RunConfig
from launch.distributed import child_processes
from launch.sweep.cluster_executor import ClusterJobs
from launch.sweep.job_queue import POLL_SECONDS


def executor_of(launcher: LauncherSettings, at_once: int, logs: Path) -> ClusterJobs:
    """SLURM or Ray.

    Args:
        at_once: jobs that may be out at the same time.
        logs: folder for what jobs print.

    Raises:
        InputError: what that needs is not here.
    """
    if launcher.name == "slurm":
        from launch.sweep.slurm import SlurmJobs

        return SlurmJobs(launcher, at_once, logs)
    from launch.sweep.ray import RayJobs

    return RayJobs(launcher, at_once, logs)


def run(config: RunConfig) -> float | None:
    """Hand over one run and show what it prints, until it has ended; returns the watched metric.

    Raises:
        InputError: it cannot be handed over.
        answer.Ended: with the run's exit code, unless it finished.
    """
    config, folder, made = _with_folder(config)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{config.launcher.name}-", dir=folder.absolute().parent) as scratch:
            files = Path(scratch, "output.txt"), Path(scratch, "errors.txt")
            code, told = _followed(config, files)
            is_shown = files[1].is_file() and told in files[1].read_text(encoding="utf-8", errors="replace")
    finally:
        run_dir.remove_empty(made)
    if code:
        said = told or (f"The run in {folder} was killed by {signal.Signals(-code).name}." if code < 0 else "")
        raise exit_codes.Ended(max(code, exit_codes.FAILED), "" if is_shown and told else said)
    return watched_value(read_report(folder))


def _with_folder(config: RunConfig) -> tuple[RunConfig, Path, list[Path]]:
    """(configuration that names the run directory, the directory, folders created for it): a requeued job finds it."""
    if config.resume not in (None, "auto"):
        return config, Path(str(config.resume)).expanduser(), []
    if config.resume == "auto":
        folder = run_dir.wanted_folder(config)
        made = run_dir.missing(folder)
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder, made = run_dir.reserve(config)
    return (replace(config, run_dir=str(folder)) if config.name is None else config), folder, made


def _followed(config: RunConfig, files: tuple[Path, Path]) -> tuple[int, str]:
    """(exit code, error it told) of the run, after showing all that it printed."""
    executor = executor_of(config.launcher, at_once=1, logs=files[0].parent)
    shown = [0, 0]

    def show() -> None:
        for place, (file, stream) in enumerate(zip(files, (sys.stdout, sys.stderr), strict=True)):
            shown[place] += _show(file, shown[place], stream)

    with child_processes.noting() as signals:
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


def _show(file: Path, start: int, stream: IO[str]) -> int:
    """Copy what was added since byte `start`; returns how many bytes that is."""
    if not file.exists():
        return 0
    with file.open("rb") as opened:
        opened.seek(start)
        added = opened.read()
    stream.write(added.decode("utf-8", errors="replace"))
    stream.flush()
    return len(added)
