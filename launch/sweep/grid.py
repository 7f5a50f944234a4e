"""Sweep: the jobs of a multirun, each composed and checked here once and run in fresh processes, n_jobs at a time."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf, open_dict

from gpt2lab.analysis.optuna_storage import STUDY_FILE
from gpt2lab.errors import InputError
from gpt2lab.reports.run_report import read_report
from gpt2lab.storage.folder_lock import FolderLock
from launch import exit_codes
from launch.config import machine, run_dir, run_spec
from launch.config.groups import experiment_keys, values
from launch.config.literal_text import is_interpolated, override
from launch.config.multirun_settings import LauncherSettings
from launch.config.schema import STUDY, RunConfig
from launch.config.unused_keys import given_keys, in_words, without
from launch.sweep import jobs, remote_run, results
from launch.sweep.job_process import LocalJobs
from launch.sweep.job_queue import Executor, Listed, Proposal, Source, run_all
from launch.sweep.jobs import Job

# What may differ where a sweep goes on
HOW = (
    "resume",
    "n_jobs",
    "max_restarts",
    "allow_targets",
    "launcher",
    *(f"launcher.{key}" for key in vars(LauncherSettings())),
)


def run_grid(
    loader: ConfigLoader, sweep_config: DictConfig, combinations: Sequence[list[str]], first: int, made: list[Path]
) -> list[JobReturn]:
    """Run every combination of a grid; `made` are the folders that Hydra has created for it.

    Raises:
        InputError: the combinations contradict each other as a whole.
        answer.Ended: a signal stopped the sweep, or jobs failed.
    """
    ran = run_sweep(loader, sweep_config, Listed(combinations), combinations, first, made)
    return [_job_return(job) for job in ran]


def run_sweep(
    loader: ConfigLoader,
    sweep_config: DictConfig,
    source: Source,
    combinations: Sequence[list[str]],
    first: int = 0,
    made: Sequence[Path] = (),
) -> list[Job]:
    """Run every job that the source proposes, with sweep.csv and sweep.html after each, then print the table.

    The sweep's folder is locked meanwhile.

    Args:
        source: where the jobs come from.
        combinations: what can be said of the jobs beforehand: all of a grid, or one for each choice of task and
            experiment that a search may make.
        first: number of the first job.
        made: folders that were created for this sweep, the innermost first; removed where no job can start.

    Raises:
        InputError: the combinations contradict each other as a whole, or another process runs a sweep in the folder.
        answer.Ended: a signal stopped the sweep, or jobs failed.
    """
    folder = Path(str(sweep_config.hydra.sweep.dir))
    tasks = {_task_of(overrides, sweep_config) for overrides in combinations}
    made = [*made] or run_dir.missing(folder)
    with ExitStack() as held:
        try:
            _check_together(combinations, tasks, sweep_config)
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(FolderLock(folder, use="a sweep", keys="hydra.sweep.dir"))
            _check_folder(folder, combinations, first, isinstance(source, Listed))
            executor = _executor(sweep_config, folder)
        except InputError:
            held.close()
            if made:
                (folder / "multirun.yaml").unlink(missing_ok=True)  # Hydra has written it
                run_dir.remove_empty(made)
            raise
        return _run_jobs(loader, sweep_config, source, executor, first, several_tasks=len(tasks) > 1)


def _run_jobs(
    loader: ConfigLoader,
    sweep_config: DictConfig,
    source: Source,
    executor: Executor,
    first: int,
    several_tasks: bool,
) -> list[Job]:
    folder = Path(str(sweep_config.hydra.sweep.dir))
    started: list[Job] = []

    def planned(proposal: Proposal) -> Job:
        number = first + len(started) if proposal.trial is None else proposal.trial
        job = Job(number, proposal.overrides, folder / str(number), error=proposal.failed, trial=proposal.trial)
        started.append(job)
        print(f"job {number}: {in_words(job.overrides)}", flush=True)
        return job

    def prepared(job: Job) -> RunConfig | None:
        return _prepared(job, loader, sweep_config, several_tasks)

    def changed(job: Job) -> None:
        try:
            results.write(folder, started)
        except OSError as error:  # a full disk, say: the jobs that run are worth more, and the next change writes again
            print(f"The sweep's results could not be written: {error}", file=sys.stderr, flush=True)
        if job.error:
            print(f"job {job.number} {job.status}: {job.error}", file=sys.stderr, flush=True)
        elif executor.several and job.status != "running":
            print(f"job {job.number} {job.status}: {_in_short(job)}", flush=True)

    try:
        stopped = run_all(source, executor, planned, prepared, changed)
    except Exception:
        print(f"Once this is mended, continue with: {_command_to_continue(folder)}", file=sys.stderr, flush=True)
        raise
    finally:
        executor.close()
        if started:
            print(results.in_words(folder, started), flush=True)
    jobs.check_all_ended_well(started, stopped, "sweep", f"Continue with: {_command_to_continue(folder)}")
    return started


def _executor(sweep_config: DictConfig, folder: Path) -> Executor:
    """Where the jobs run."""
    launcher = OmegaConf.to_object(sweep_config.launcher)
    assert isinstance(launcher, LauncherSettings)
    if launcher.name != "processes":
        return remote_run.executor_of(launcher, int(sweep_config.n_jobs), folder / "logs")
    gpus = [] if sweep_config.accelerator == "cpu" or sweep_config.n_jobs == 1 else machine.usable_gpus()
    return LocalJobs(machine.partition(int(sweep_config.n_jobs), machine.usable_cores(), gpus), folder / "logs")


def _task_of(overrides: list[str], sweep_config: DictConfig) -> str:
    """The task a job will have, read without composing it."""
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    default = sweep_config.hydra.runtime.choices.task
    of_experiment = experiment_keys(given["experiment"])[0] if given.get("experiment") in values("experiment") else {}
    return str(given.get("task", of_experiment.get("task", default)))


def _check_together(combinations: Sequence[list[str]], tasks: set[str], sweep_config: DictConfig) -> None:
    """Jobs have folders of their own, and a distillation cannot wait for a teacher that the same sweep trains."""
    experiment = str(sweep_config.hydra.runtime.choices.experiment)
    if experiment == STUDY or any(f"experiment={STUDY}" in overrides for overrides in combinations):
        raise InputError(f"experiment={STUDY} is many runs already, each with a folder of its own.\nLeave out -m.")
    given = {override for overrides in combinations for override in overrides}
    keys = set(given_keys(given))
    if "plan" in keys:
        raise InputError(
            "plan=true plans one run, and a sweep is many.\nLeave out -m, and plan the largest of its jobs."
        )
    if {"run_dir", "name"} & keys or ("resume" in keys and "resume=auto" not in given):
        raise InputError(
            "run_dir, name and resume=RUN_DIR cannot be given in a sweep: each job has a folder of its own.\n"
            "Set the sweep's: hydra.sweep.dir=FOLDER; with resume=auto a sweep that was interrupted goes on there."
        )
    if len({override for override in given if override.startswith("launcher=")}) > 1:
        raise InputError("launcher says where all jobs of a sweep are run: give one value.")
    if {"pretrain", "distill"} <= tasks and "teacher" not in keys:
        raise InputError(
            "A sweep over task=pretrain,distill needs a teacher named: jobs do not wait for each other's results.\n"
            "Give teacher=RUN_DIR (or a model folder or Hub id), or run the two one after the other."
        )


def _check_folder(folder: Path, combinations: Sequence[list[str]], first: int, is_grid: bool) -> None:
    """The folder is free, or holds this sweep, which goes on: what it says of finished jobs is not written over.

    Raises:
        InputError
    """
    cure = "or give another hydra.sweep.dir."
    if (folder / "sweep.csv").exists() and not any("resume=auto" in overrides for overrides in combinations):
        raise InputError(f"{folder} holds a sweep already.\nContinue it: the same command and resume=auto, {cure}")
    if not is_grid and (folder / "sweep.csv").exists() and not (folder / STUDY_FILE).exists():
        raise InputError(f"{folder} holds a sweep and no study of a search ({STUDY_FILE}).\nPut it back, {cure}")
    for number, overrides in enumerate(combinations if is_grid else [], first):
        file = folder / str(number) / "config.yaml"
        interpolated = given_keys(filter(is_interpolated, overrides))  # these are compared once they are composed
        stored = run_spec.load(file).config.invocation.overrides if file.is_file() else []
        others = set(without(stored, {*HOW, *interpolated})) - set(overrides)
        if others:
            raise InputError(
                f"{folder} holds another sweep: its job {number} has {in_words(sorted(others))}.\n"
                f"Give the command that it had, {cure}"
            )


def _prepared(job: Job, loader: ConfigLoader, sweep_config: DictConfig, several_tasks: bool) -> RunConfig | None:
    """A job's checked configuration; None: nothing is left to run. What another task reads is no mistake of its own."""

    if job.error:
        job.status = "failed"
        return None

    def compose(overrides: list[str]) -> DictConfig:
        tree = loader.load_sweep_config(sweep_config, overrides)
        with open_dict(tree):
            tree.hydra.job.num = job.number
        return tree

    config = jobs.prepared(job, compose, drops_unread=several_tasks)
    if config is None:
        return None
    config = replace(config, invocation=replace(config.invocation, trial=job.trial))
    if config.resume is None or not (job.folder / "config.yaml").is_file():
        return config
    stored = run_spec.load(job.folder / "config.yaml").config.invocation.overrides
    if without(stored, HOW) != without(config.invocation.overrides, HOW):
        job.status, job.error = "failed", f"{job.folder} holds another job; continue a sweep with the command it had"
        return None
    if read_report(job.folder).get("status") in ("finished", "pruned"):
        jobs.conclude(job, exit_codes.FINISHED, "")
        return None
    return config


def _in_short(job: Job) -> str:
    """What a finished job has to show."""
    report = read_report(job.folder)
    value = "" if job.watched is None else f"{report['watched_metric']} {job.watched:.4f}, "
    return f"{value}{report.get('seconds', 0):.0f} s"


def _command_to_continue(folder: Path) -> str:
    """The command that was given, for the same folder."""
    own = ("hydra.sweep.dir=", "resume=")
    given = [argument for argument in sys.argv[1:] if not argument.startswith(own)]
    return in_words(["python", "train.py", *given, override("hydra.sweep.dir", str(folder)), "resume=auto"])


def _job_return(job: Job) -> JobReturn:
    """What a sweeper is told: the watched metric."""
    result = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
    result.return_value = job.watched
    return result
