"""Sweep: the jobs of a multirun, one after another, each checked here and run in a fresh process.

A job that is misconfigured, fails or is killed is recorded and the next one starts; a signal to this process goes to
the running job, and then the sweep ends too.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, open_dict

from gpt2lab.errors import InputError
from gpt2lab.run_report import read_report
from launch.configuration.config import STUDY
from launch.configuration.groups import experiment_keys, values
from launch.configuration.ignored_keys import given_keys, in_words
from launch.running import jobs, run_folders
from launch.running.jobs import Job

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


def run_sweep(
    loader: ConfigLoader, sweep_config: DictConfig, combinations: Sequence[list[str]], first: int
) -> list[JobReturn]:
    """Run every job, then print the table and write sweep.csv.

    Raises:
        InputError: the combinations contradict each other as a whole.
        answer.Ended: a signal stopped the sweep, or jobs failed.
    """
    folder = Path(str(sweep_config.hydra.sweep.dir))
    planned = [Job(first + i, overrides, folder / str(first + i)) for i, overrides in enumerate(combinations)]
    tasks = [_task_of(job, sweep_config) for job in planned]
    try:
        _check_together(planned, tasks, str(sweep_config.hydra.runtime.choices.experiment))
    except InputError:
        (folder / "multirun.yaml").unlink(missing_ok=True)  # Hydra has written it
        run_folders.remove_empty(folder)
        raise
    stopped = 0
    for job in planned:
        print(f"job {job.number}: {in_words(job.overrides)}", flush=True)
        stopped = _run(loader, sweep_config, job, several_tasks=len(set(tasks)) > 1)
        jobs.write_csv(folder / "sweep.csv", COLUMNS, map(_row, planned))
        if job.error:
            print(f"job {job.number} {job.status}: {job.error}", file=sys.stderr, flush=True)
        if stopped:
            break
    print(_table(planned))
    print(f"{folder}/sweep.csv")
    jobs.check_all_ended_well(planned, stopped, "sweep")
    return [_job_return(job) for job in planned]


def _task_of(job: Job, sweep_config: DictConfig) -> str:
    """The task a job will have, read without composing it."""
    given = dict(override.split("=", 1) for override in job.overrides if "=" in override)
    default = sweep_config.hydra.runtime.choices.task
    of_experiment = experiment_keys(given["experiment"])[0] if given.get("experiment") in values("experiment") else {}
    return str(given.get("task", of_experiment.get("task", default)))


def _check_together(planned: list[Job], tasks: list[str], experiment: str) -> None:
    """Jobs have folders of their own, and a distillation cannot wait for a teacher that the same sweep trains."""
    if experiment == STUDY or any(f"experiment={STUDY}" in job.overrides for job in planned):
        raise InputError(f"experiment={STUDY} is many runs already, each with a folder of its own.\nLeave out -m.")
    if any("plan" in given_keys(job.overrides) for job in planned):
        raise InputError(
            "plan=true plans one run, and a sweep is many.\nLeave out -m, and plan the largest of its jobs."
        )
    if {"run_dir", "name", "resume"} & {key for job in planned for key in given_keys(job.overrides)}:
        raise InputError(
            "run_dir, name and resume cannot be given in a sweep: each job has a folder of its own.\n"
            "Set the sweep's: hydra.sweep.dir=FOLDER"
        )
    if {"pretrain", "distill"} <= set(tasks) and not any("teacher" in given_keys(job.overrides) for job in planned):
        raise InputError(
            "A sweep over task=pretrain,distill needs a teacher named: jobs do not wait for each other's results.\n"
            "Give teacher=RUN_DIR (or a model folder or Hub id), or run the two one after the other."
        )


def _run(loader: ConfigLoader, sweep_config: DictConfig, job: Job, several_tasks: bool) -> int:
    """One job; what another task of this sweep reads is no mistake of its own. Returns the signal that came, or 0."""

    def compose(overrides: list[str]) -> DictConfig:
        tree = loader.load_sweep_config(sweep_config, overrides)
        with open_dict(tree):
            tree.hydra.job.num = job.number
        return tree

    return jobs.run(job, compose, drops_unread=several_tasks)


def _row(job: Job) -> dict[str, Any]:
    """A line of sweep.csv."""
    report = read_report(job.folder)
    shown = {name: report.get(name, "") for name in ("watched_metric", "val_loss", "seconds", "tokens_per_second")}
    own = {"job": job.number, "status": job.status, "overrides": in_words(job.overrides), "error": job.error}
    return {**shown, **own, "watched": "" if job.watched is None else job.watched}


def _table(planned: list[Job]) -> str:
    """The sweep as the terminal shows it, one line a job, with the overrides in which the jobs differ."""
    shared = set.intersection(*(set(job.overrides) for job in planned)) if len(planned) > 1 else set()
    lines = [("job", "status", "watched", "value", "seconds", "overrides")]
    for job in planned:
        row = _row(job)
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
