"""Jobs: runs in processes of their own; how one is composed and checked, what became of it, and the CSV file of all."""

import csv
import io
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from gpt2lab.reports.run_report import read_report, watched_value
from gpt2lab.storage.atomic_files import write_text
from launch import exit_codes
from launch.checks import checks
from launch.config import schema
from launch.config.schema import RunConfig
from launch.config.unused_keys import in_words, unread_keys, without
from launch.distributed import child_processes
from launch.sweep.job_process import JobProcess


@dataclass
class Job:
    """One run among several and what became of it."""

    number: int
    overrides: list[str]
    folder: Path
    status: str = "waiting"
    error: str = ""
    watched: float | None = None
    trial: int | None = None  # its number in the study of a search, which may end it early


def prepared(job: Job, compose: Callable[[list[str]], DictConfig], drops_unread: bool) -> RunConfig | None:
    """Compose and check a job; None: it cannot be run, which is recorded.

    Args:
        compose: overrides → the composed tree with Hydra's own node.
        drops_unread: leave out the keys that only another task of these jobs reads, instead of refusing them.
    """
    try:
        config = _composed(job, compose(job.overrides), job.overrides)
        if drops_unread:
            read = without(job.overrides, unread_keys(config))
            config = _composed(job, compose(read), read)
        checks.check(config)
    except Exception as error:
        mistake = exit_codes.as_mistake(error)
        if mistake is None:
            raise
        job.status, job.error = "failed", " ".join(str(mistake).split("\n"))
        return None
    return config


def command_of(overrides: Iterable[str]) -> str:
    """The command that runs a job again as a run of its own, to be typed into a shell."""
    return f"python train.py {in_words(without(overrides, ('n_jobs', 'resume')))}"


def conclude(job: Job, code: int, told: str) -> None:
    """Note what became of a job whose process ended with this exit code and told this error."""
    report = read_report(job.folder)
    job.status = {
        exit_codes.FINISHED: "finished",
        exit_codes.STOPPED: "stopped",
        exit_codes.INTERRUPTED: "stopped",
    }.get(code, "failed")
    if job.status == "failed":
        died = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        job.error = " ".join(told.split("\n")) or report.get("error") or died
        return
    if job.status == "finished" and report.get("status") == "pruned":
        job.status = "pruned"
    if job.status in ("finished", "pruned"):
        job.watched = watched_value(report)


def run(job: Job, compose: Callable[[list[str]], DictConfig], drops_unread: bool) -> int:
    """Run one job in a process of its own; returns the signal that stopped it, or 0."""
    config = prepared(job, compose, drops_unread)
    if config is None:
        return 0
    code, stopped, told = run_process(config)
    conclude(job, code, told)
    return stopped


def check_all_ended_well(jobs: Sequence[Job], stopped: int, what: str, cure: str = "") -> None:
    """The exit code of several jobs: what a signal asks for, else 1 where one failed, else 75 where one was stopped.

    Args:
        stopped: the signal that came, or 0.
        what: what these jobs are together: sweep, study.
        cure: what to do after a stop.

    Raises:
        answer.Ended
    """
    if stopped:
        message = f"The {what} was stopped by {signal.Signals(stopped).name}."
        raise exit_codes.Ended(exit_codes.code_of_signal(stopped), f"{message} {cure}".rstrip())
    failed = sum(job.status == "failed" for job in jobs)
    if failed:
        raise exit_codes.Ended(exit_codes.FAILED, f"{failed} of {len(jobs)} jobs failed.")
    halted = sum(job.status == "stopped" for job in jobs)
    if halted:  # by a signal of its own
        raise exit_codes.Ended(exit_codes.STOPPED, f"{halted} of {len(jobs)} jobs were stopped. {cure}".rstrip())


def write_csv(file: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write all rows; called after every job, so that the file can be read at any time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, lines.getvalue())


def _composed(job: Job, tree: DictConfig, overrides: list[str]) -> RunConfig:
    with open_dict(tree):
        hydra = tree.pop("hydra")
    OmegaConf.set_struct(tree, True)
    config = schema.from_hydra(tree, hydra, command=command_of(overrides))
    return replace(config, run_dir=str(job.folder))


def run_process(config: RunConfig) -> tuple[int, int, str]:
    """(exit code, signal that came meanwhile or 0, error it told) of a run in a process and session of its own."""
    process = JobProcess(config)
    with child_processes.forwarding(process.signal) as signals:
        code, told = process.wait()
    return code, signals[-1] if signals else 0, told
