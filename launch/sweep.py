"""Sweep: the jobs of a multirun, one after another, each checked here and run in a fresh process.

A job that is misconfigured, fails or is killed is recorded and the next one starts; a signal to this process goes to
the running job, and then the sweep ends too.
"""

import csv
import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf, open_dict

from gpt2lab.atomic_files import write_text
from gpt2lab.errors import InputError
from gpt2lab.run_report import read_report
from launch import answer, checks, children, config, run_folders
from launch.ignored_keys import given_keys, in_words, unread_keys, without
from launch.job import ERROR_FILE

ROOT = Path(__file__).parent.parent
COLUMNS = (
    "job",
    "status",
    "watched_metric",
    "watched",
    "val_loss",
    "seconds",
    "tokens_per_second",
    "overrides",
    "error",
)


@dataclass
class Job:
    """One combination of a sweep and what became of it."""

    number: int
    overrides: list[str]
    folder: Path
    status: str = "waiting"
    error: str = ""
    watched: float | None = None

    def row(self) -> dict[str, Any]:
        """A line of sweep.csv."""
        report = read_report(self.folder)
        shown = {name: report.get(name, "") for name in ("watched_metric", "val_loss", "seconds", "tokens_per_second")}
        own = {"job": self.number, "status": self.status, "overrides": in_words(self.overrides), "error": self.error}
        return {**shown, **own, "watched": "" if self.watched is None else self.watched}


def run_sweep(
    loader: ConfigLoader, sweep_config: DictConfig, combinations: Sequence[list[str]], first: int
) -> list[JobReturn]:
    """Run every job, then print the table and write sweep.csv.

    Raises:
        InputError: the combinations contradict each other as a whole.
        answer.Ended: a signal stopped the sweep, or jobs failed.
    """
    folder = Path(str(sweep_config.hydra.sweep.dir))
    jobs = [Job(first + i, overrides, folder / str(first + i)) for i, overrides in enumerate(combinations)]
    tasks = [_task_of(loader, sweep_config, job) for job in jobs]
    try:
        _check_together(jobs, tasks)
    except InputError:
        (folder / "multirun.yaml").unlink(missing_ok=True)  # Hydra has written it
        run_folders.remove_empty(folder)
        raise
    stopped = 0
    for job in jobs:
        print(f"job {job.number}: {in_words(job.overrides)}", flush=True)
        stopped = _run(loader, sweep_config, job, several_tasks=len(set(tasks)) > 1)
        _write_csv(folder / "sweep.csv", jobs)
        if job.error:
            print(f"job {job.number} {job.status}: {job.error}", file=sys.stderr, flush=True)
        if stopped:
            break
    print(_table(jobs))
    print(f"{folder}/sweep.csv")
    failed = sum(job.status == "failed" for job in jobs)
    if stopped:
        raise answer.Ended(answer.code_of_signal(stopped), f"The sweep was stopped by {signal.Signals(stopped).name}.")
    if failed:
        raise answer.Ended(answer.FAILED, f"{failed} of {len(jobs)} jobs failed.")
    return [_job_return(job) for job in jobs]


def _task_of(loader: ConfigLoader, sweep_config: DictConfig, job: Job) -> str:
    """The task a job will have, read without composing it."""
    given = [override.split("=", 1)[1] for override in job.overrides if override.startswith("task=")]
    return given[-1] if given else str(sweep_config.hydra.runtime.choices.task)


def _check_together(jobs: list[Job], tasks: list[str]) -> None:
    """Jobs have folders of their own, and a distillation cannot wait for a teacher that the same sweep trains."""
    if {"run_dir", "name", "resume"} & {key for job in jobs for key in given_keys(job.overrides)}:
        raise InputError(
            "run_dir, name and resume cannot be given in a sweep: each job has a folder of its own.\n"
            "Set the sweep's: hydra.sweep.dir=FOLDER"
        )
    if {"pretrain", "distill"} <= set(tasks) and not any("teacher" in given_keys(job.overrides) for job in jobs):
        raise InputError(
            "A sweep over task=pretrain,distill needs a teacher named: jobs do not wait for each other's results.\n"
            "Give teacher=RUN_DIR (or a model folder or Hub id), or run the two one after the other."
        )


def _run(loader: ConfigLoader, sweep_config: DictConfig, job: Job, several_tasks: bool) -> int:
    """Compose, check and run one job; returns the signal that stopped it, or 0."""
    try:
        settings = _composed(loader, sweep_config, job, job.overrides)
        if several_tasks:  # what another task of this sweep reads is no mistake of this job's
            read = without(job.overrides, unread_keys(settings))
            settings = _composed(loader, sweep_config, job, read)
        checks.check(settings)
    except Exception as error:
        mistake = answer.as_mistake(error)
        if mistake is None:
            raise
        job.status, job.error = "failed", " ".join(str(mistake).split("\n"))
        return 0
    code, stopped, told = _run_process(settings)
    report = read_report(job.folder)
    job.status = {answer.FINISHED: "finished", answer.STOPPED: "stopped", answer.INTERRUPTED: "stopped"}.get(
        code, "failed"
    )
    if job.status == "failed":
        died = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        job.error = " ".join(told.split("\n")) or report.get("error") or died
    elif job.status == "finished":
        job.watched = report.get("metrics", {}).get(report.get("watched_metric"))
    return stopped


def _composed(loader: ConfigLoader, sweep_config: DictConfig, job: Job, overrides: list[str]) -> config.Config:
    tree = loader.load_sweep_config(sweep_config, overrides)
    with open_dict(tree):
        tree.hydra.job.num = job.number
        hydra = tree.pop("hydra")
    OmegaConf.set_struct(tree, True)
    settings = config.typed(tree, hydra, command=f"python train.py {in_words(overrides)}")
    settings.run_dir = str(job.folder)
    return settings


def _run_process(settings: config.Config) -> tuple[int, int, str]:
    """(exit code, signal that came meanwhile or 0, error it told) of a job in a process and session of its own."""
    with tempfile.TemporaryDirectory(prefix="gpt2lab-job-") as scratch:
        spec = Path(scratch, "config.yaml")
        config.save(settings, spec)
        search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.job", str(spec), str(os.getpid())],
            env={**os.environ, "PYTHONPATH": search},
            start_new_session=True,
        )
        with children.forwarding(lambda: [process.pid]) as signals:
            code = process.wait()
        error = spec.with_name(ERROR_FILE)
        told = error.read_text(encoding="utf-8") if error.is_file() else ""
    return code, signals[-1] if signals else 0, told


def _write_csv(file: Path, jobs: list[Job]) -> None:
    """Rewritten after every job, so that it can be read at any time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(job.row() for job in jobs)
    write_text(file, lines.getvalue())


def _table(jobs: list[Job]) -> str:
    """The sweep as the terminal shows it, one line a job, with the overrides in which the jobs differ."""
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    lines = [("job", "status", "watched", "value", "seconds", "overrides")]
    for job in jobs:
        row = job.row()
        value = "" if job.watched is None else f"{job.watched:.4f}"
        seconds = f"{row['seconds']:.0f}" if row["seconds"] != "" else ""
        own = in_words(override for override in job.overrides if override not in shared)
        lines.append((str(job.number), job.status, row["watched_metric"], value, seconds, own))
    widths = [max(len(str(line[column])) for line in lines) for column in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join([*(str(cell).ljust(width) for cell, width in zip(line, widths, strict=False)), str(line[-1])])
        for line in lines
    )


def _job_return(job: Job) -> JobReturn:
    """What a sweeper is told: the watched metric."""
    result = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
    result.return_value = job.watched
    return result
