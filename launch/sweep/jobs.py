"""Jobs: composes and checks the runs of a sweep or a study, runs them in subprocesses, and records their results."""

import csv
import io
import shlex
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gpt2lab.errors import InputError
from gpt2lab.storage.atomic_files import write_text
from gpt2lab.storage.report_json import read_report, watched_value
from launch import exit_codes
from launch.checks import checks
from launch.config import run_dir, schema
from launch.config.schema import RunConfig
from launch.config.unused_keys import unread_keys, without
from launch.distributed import child_processes
from launch.sweep.executor import Executor
from launch.sweep.job_process import JobProcess


@dataclass
class Job:
    """A run of a sweep or a study, and its result."""

    number: int
    overrides: list[str]
    folder: Path
    status: str = "waiting"
    error: str = ""
    watched: float | None = None
    trial: int | None = None  # Optuna trial number


def checked(job: Job, compose: Callable[[list[str]], DictConfig], drops_unread: bool) -> RunConfig:
    """Compose and check the configuration of a job.

    Args:
        compose: overrides → composed tree, with Hydra's own node.
        drops_unread: leave out keys that the job's task does not read, instead of rejecting them.

    Raises:
        InputError: it is invalid.
    """
    try:
        config = _to_config(job, compose(job.overrides), job.overrides)
        if drops_unread:
            read = without(job.overrides, unread_keys(config))
            config = _to_config(job, compose(read), read)
        checks.check(config)
        checks.check_model_folders(config)
    except Exception as error:
        input_error = exit_codes.as_input_error(error)
        if input_error is None:
            raise
        raise input_error from None
    return config


def prepare(job: Job, compose: Callable[[list[str]], DictConfig], drops_unread: bool) -> RunConfig | None:
    """Compose and check the configuration of a job; return None, and record the error, if it is invalid."""
    try:
        return checked(job, compose, drops_unread)
    except InputError as error:
        job.status, job.error = "failed", " ".join(str(error).split("\n"))
        return None


def check_common_errors(
    jobs: Sequence[Job], check: Callable[[Job], RunConfig], searched: Iterable[str], executor: Executor
) -> None:
    """Check that the jobs do not all fail with the same error; usually the first starts, and no other is composed.

    Args:
        check: composes and checks the configuration of a job; raises InputError.
        searched: keys whose values a search chooses later; an error that names one is not common to all jobs.

    Raises:
        InputError: the error that all of them have.
    """
    common = ""
    for job in jobs:
        try:
            config = check(job)
        except InputError as error:
            message = str(error).replace(str(job.folder), str(job.folder.parent / "N"))
            if common not in ("", message):
                return
            common = message
        else:
            if common or any((job.folder / run_dir.CONFIG).exists() for job in jobs):
                return  # resumed: they started before
            common = _common_start_error(config, jobs[1:], check, executor)
            break
    if common and not any(key in common for key in searched):
        raise InputError(common)


def _common_start_error(
    first: RunConfig, others: Sequence[Job], check: Callable[[Job], RunConfig], executor: Executor
) -> str:
    """Return the error with which all jobs end after their configuration was checked, such as text that is empty."""
    if not (error := executor.common_error([first])) or not others:
        return error
    try:
        return executor.common_error([first, *map(check, others)])
    except InputError:
        return ""


def single_run_command(overrides: Iterable[str]) -> str:
    """Return the shell command that repeats a job as a single run."""
    return f"python train.py {shlex.join(without(overrides, ('n_jobs', 'resume')))}"


def record_end(job: Job, code: int, error: str) -> None:
    """Record status, error and watched metric of a job, given the exit code and the error message of its process."""
    report = read_report(job.folder)
    job.status = {
        exit_codes.FINISHED: "finished",
        exit_codes.STOPPED: "stopped",
        exit_codes.INTERRUPTED: "stopped",
    }.get(code, "failed")
    if job.status == "failed":
        died = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        job.error = " ".join(error.split("\n")) or report.get("error") or died
        return
    if job.status == "finished" and report.get("status") == "pruned":
        job.status = "pruned"
    if job.status in ("finished", "pruned"):
        job.watched = watched_value(report)


def run(job: Job, compose: Callable[[list[str]], DictConfig], drops_unread: bool) -> int:
    """Run one job in a subprocess; return the signal that stopped it, or 0."""
    config = prepare(job, compose, drops_unread)
    if config is None:
        return 0
    code, stopped, error = run_process(config)
    record_end(job, code, error)
    return stopped


def check_all_finished(jobs: Sequence[Job], stopped: int, what: str, hint: str = "") -> None:
    """Raise `Exit` unless all jobs finished: with the signal's code, else 1 if one failed, else 75 if one was stopped.

    Args:
        stopped: the received signal, or 0.
        what: noun for the message: sweep, study.
        hint: what to do after a stop.

    Raises:
        exit_codes.Exit: a job did not finish.
    """
    if stopped:
        message = f"The {what} was stopped by {signal.Signals(stopped).name}."
        raise exit_codes.Exit(exit_codes.signal_exit_code(stopped), f"{message} {hint}".rstrip())
    failed = sum(job.status == "failed" for job in jobs)
    if failed:
        raise exit_codes.Exit(exit_codes.FAILED, f"{failed} of {len(jobs)} jobs failed.")
    halted = sum(job.status == "stopped" for job in jobs)
    if halted:  # by a signal to the job alone
        raise exit_codes.Exit(exit_codes.STOPPED, f"{halted} of {len(jobs)} jobs were stopped. {hint}".rstrip())


def write_csv(file: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write all rows; called after every job, so that the file is always current."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, lines.getvalue())


def _to_config(job: Job, tree: DictConfig, overrides: list[str]) -> RunConfig:
    return replace(schema.from_composed(tree, single_run_command(overrides)), run_dir=str(job.folder))


def run_process(config: RunConfig) -> tuple[int, int, str]:
    """Run in a subprocess; return (exit code, last received signal or 0, error message or "")."""
    process = JobProcess(config)
    with child_processes.forward_signals(process.signal) as signals:
        code, error = process.wait()
    return code, signals[-1] if signals else 0, error
