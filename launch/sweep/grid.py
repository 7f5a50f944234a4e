"""Sweep: checks the jobs of a Hydra multirun together, runs `n_jobs` at a time in subprocesses, writes the results."""

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, open_dict

from gpt2lab.analysis.optuna_storage import STUDY_FILE
from gpt2lab.errors import InputError
from gpt2lab.storage.atomic_files import delete_scratch_files
from gpt2lab.storage.folder_lock import FolderLock
from gpt2lab.storage.report_json import is_finished, read_report
from gpt2lab.system.terminal import show, terminal_width
from launch import exit_codes
from launch.config import machine, run_dir, run_spec
from launch.config.groups import experiment_keys, values
from launch.config.literal_text import is_interpolated, override
from launch.config.multirun_settings import LauncherSettings
from launch.config.schema import STUDY, RunConfig
from launch.config.structured import frozen
from launch.config.unused_keys import given_keys, without
from launch.logging_setup import announce
from launch.sweep import jobs, remote_run, results
from launch.sweep.executor import Executor
from launch.sweep.job_process import LocalJobs
from launch.sweep.job_queue import JobList, JobQueue, Proposal, Source
from launch.sweep.jobs import Job
from launch.sweep.sweep_progress import SweepProgress
from launch.sweep.text_table import wrapped

CHANGEABLE_ON_RESUME = (  # keys that may differ when a sweep is resumed
    "resume",
    "n_jobs",
    "max_restarts",
    "allow_targets",
    "launcher",
    *(f"launcher.{key}" for key in vars(LauncherSettings())),
)


def run_grid(
    loader: ConfigLoader, sweep_config: DictConfig, combinations: Sequence[list[str]], first: int, created: list[Path]
) -> list[JobReturn]:
    """Run every combination of a grid; arguments and errors as for `run_sweep`.

    Returns:
        For each job what Hydra passes to a sweeper: the watched metric.
    """
    ran = run_sweep(loader, sweep_config, JobList(combinations), combinations, first, created)
    return [_job_return(job) for job in ran]


def run_sweep(
    loader: ConfigLoader,
    sweep_config: DictConfig,
    source: Source,
    combinations: Sequence[list[str]],
    first: int = 0,
    created: Sequence[Path] = (),
    searched: Sequence[str] = (),
) -> list[Job]:
    """Run every job that the source proposes, write sweep.csv and sweep.html after each, and print the final table.

    The sweep's folder is locked until the end.

    Args:
        source: source of the jobs.
        combinations: overrides of the jobs that are known in advance: all of a grid, or one job for each task and
            experiment that a search may choose.
        first: number of the first job.
        created: folders that were created for this sweep, innermost first; removed if no job can start.
        searched: keys whose values a search chooses.

    Raises:
        InputError: a key or a combination of jobs is not supported in a sweep, the folder is in use, or all jobs have
            the same error.
        exit_codes.Exit: a signal stopped the sweep, or jobs failed.
    """
    announce(f"Checking the jobs of {sweep_config.hydra.sweep.dir}")
    folder = Path(str(sweep_config.hydra.sweep.dir))
    tasks = {_task_of(overrides, sweep_config) for overrides in combinations}
    created = [*created] or run_dir.missing_folders(folder)
    with ExitStack() as held:
        try:
            _check_together(combinations, tasks, sweep_config)
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(FolderLock(folder, use="a sweep", keys="hydra.sweep.dir"))
            _check_folder(folder, combinations, first, isinstance(source, JobList))
            delete_scratch_files(folder)
            known = [Job(number, keys, folder / str(number)) for number, keys in enumerate(combinations, first)]
            executor = _executor(sweep_config, folder)
            check = partial(jobs.checked, compose=_composer(loader, sweep_config), drops_unread=len(tasks) > 1)
            _check_uploads(known, check, isinstance(source, JobList))
            jobs.check_common_errors(known, check, searched, executor)
        except InputError:
            held.close()
            if created:
                (folder / "multirun.yaml").unlink(missing_ok=True)  # written by Hydra
                run_dir.remove_empty(created)
            raise
        keys = [*searched] or results.varied_keys(combinations)
        progress = SweepProgress(source.total, keys, executor.max_jobs, has_bar=executor.is_parallel)
        return _run_jobs(loader, sweep_config, source, executor, first, len(tasks) > 1, progress)


def _run_jobs(
    loader: ConfigLoader,
    sweep_config: DictConfig,
    source: Source,
    executor: Executor,
    first: int,
    several_tasks: bool,
    progress: SweepProgress,
) -> list[Job]:
    folder = Path(str(sweep_config.hydra.sweep.dir))
    started: list[Job] = []

    def create_job(proposal: Proposal) -> Job:
        number = first + len(started) if proposal.trial is None else proposal.trial
        job = Job(number, proposal.overrides, folder / str(number), error=proposal.failed, trial=proposal.trial)
        started.append(job)
        progress.create(job)
        return job

    prepare = partial(_prepare, loader=loader, sweep_config=sweep_config, several_tasks=several_tasks)

    def on_change(job: Job) -> None:
        try:
            results.write(folder, started)
        except OSError as error:  # such as a full disk: running jobs continue, and the next change writes again
            print(f"The sweep's results could not be written: {error}", file=sys.stderr, flush=True)
        progress.change(job)
        if job.error:
            print(f"{progress.name(job)} {job.status}: {job.error}", file=sys.stderr, flush=True)
        elif executor.is_parallel and job.status != "running":
            show(wrapped(f"{progress.name(job)} {job.status}: {progress.result(job)}", terminal_width()))

    try:
        with progress.bar if progress.has_bar else nullcontext():
            stopped = JobQueue(source, executor, create_job, prepare, on_change, progress.wait).run()
    except Exception:
        print(f"After fixing this, continue with: {_resume_command(folder)}", file=sys.stderr, flush=True)
        raise
    finally:
        executor.close()
        if started:
            show(results.format_results(folder, started, terminal_width()))
    jobs.check_all_finished(started, stopped, "sweep", f"Continue with: {_resume_command(folder)}")
    return started


def _executor(sweep_config: DictConfig, folder: Path) -> Executor:
    """Create the executor that `launcher` selects."""
    launcher = frozen(LauncherSettings, sweep_config.launcher)
    if launcher.name != "processes":
        return remote_run.create_executor(launcher, int(sweep_config.n_jobs), folder / "logs")
    gpus = [] if sweep_config.accelerator == "cpu" or sweep_config.n_jobs == 1 else machine.usable_gpus()
    return LocalJobs(machine.partition(int(sweep_config.n_jobs), machine.usable_cores(), gpus), folder / "logs")


def _task_of(overrides: list[str], sweep_config: DictConfig) -> str:
    """Name of a job's task, without composing the job."""
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    default = sweep_config.hydra.runtime.choices.task
    of_experiment = experiment_keys(given["experiment"])[0] if given.get("experiment") in values("experiment") else {}
    return str(given.get("task", of_experiment.get("task", default)))


def _check_together(combinations: Sequence[list[str]], tasks: set[str], sweep_config: DictConfig) -> None:
    """Check keys and combinations of jobs that are not supported in a sweep.

    Raises:
        InputError: such a key or combination is given.
    """
    experiment = str(sweep_config.hydra.runtime.choices.experiment)
    if experiment == STUDY or any(f"experiment={STUDY}" in overrides for overrides in combinations):
        raise InputError(f"experiment={STUDY} consists of many runs already.\nLeave out -m.")
    given = {override for overrides in combinations for override in overrides}
    keys = set(given_keys(given))
    if "plan" in keys:
        raise InputError(
            "plan=true plans one run and cannot be used in a sweep.\nLeave out -m, and plan the largest job."
        )
    if {"run_dir", "name"} & keys or ("resume" in keys and "resume=auto" not in given):
        raise InputError(
            "run_dir, name and resume=RUN_DIR cannot be given in a sweep: each job has its own folder.\n"
            "Set hydra.sweep.dir=FOLDER instead; add resume=auto to resume an interrupted sweep in it."
        )
    if len({override for override in given if override.startswith("launcher=")}) > 1:
        raise InputError("All jobs of a sweep use the same launcher: give one value.")
    if {"pretrain", "distill"} <= tasks and "teacher" not in keys:
        raise InputError(
            "A sweep over task=pretrain,distill needs teacher=: a job cannot use the model of another job.\n"
            "Give teacher=RUN_DIR (or a model folder or Hub id), or run the two one after the other."
        )


def _check_uploads(known: Sequence[Job], check: Callable[[Job], RunConfig], is_grid: bool) -> None:
    """Check that each job uploads its model to another repository or branch.

    Raises:
        InputError: two jobs have the same.
    """
    if "hub.push" not in {key for job in known for key in given_keys(job.overrides)}:
        return
    places = []
    for job in known if is_grid else []:
        with suppress(InputError):  # of this job alone; it fails with it
            hub = check(job).hub
            places += [(hub.push, hub.revision)] if hub.push is not None else []
    if not is_grid or len(set(places)) < len(places):
        raise InputError(
            "hub.push: several jobs of the sweep would upload their models to one repository.\n"
            "Name what differs, hub.push='USER/NAME-${seed}', or upload the best: hf upload USER/NAME RUN/hf"
        )


def _check_folder(folder: Path, combinations: Sequence[list[str]], first: int, is_grid: bool) -> None:
    """Check that the folder contains no other sweep, whose results would be overwritten.

    Raises:
        InputError: the folder contains another sweep, or this one and resume=auto is missing.
    """
    or_move = "or give another hydra.sweep.dir."
    if (folder / "sweep.csv").exists() and not any("resume=auto" in overrides for overrides in combinations):
        raise InputError(f"{folder} contains a sweep already.\nResume it: the same command and resume=auto, {or_move}")
    if not is_grid and (folder / "sweep.csv").exists() and not (folder / STUDY_FILE).exists():
        raise InputError(f"{folder} contains a sweep without an Optuna study ({STUDY_FILE}).\nRestore it, {or_move}")
    for number, overrides in enumerate(combinations if is_grid else [], first):
        file = folder / str(number) / "config.yaml"
        interpolated = given_keys(filter(is_interpolated, overrides))  # compared after composition
        stored = run_spec.load(file).config.invocation.overrides if file.is_file() else []
        others = set(without(stored, {*CHANGEABLE_ON_RESUME, *interpolated})) - set(overrides)
        if others:
            raise InputError(
                f"{folder} contains another sweep: its job {number} has {shlex.join(sorted(others))}.\n"
                f"Give the same command as before, {or_move}"
            )


def _prepare(job: Job, loader: ConfigLoader, sweep_config: DictConfig, several_tasks: bool) -> RunConfig | None:
    """Compose and check a job; return None if it failed, or had finished before the sweep was resumed.

    Args:
        several_tasks: whether the sweep has several tasks; keys that only another task reads are then left out.
    """
    if job.error:
        job.status = "failed"
        return None

    config = jobs.prepare(job, _composer(loader, sweep_config, job.number), drops_unread=several_tasks)
    if config is None:
        return None
    config = replace(config, invocation=replace(config.invocation, trial=job.trial))
    if config.resume is None or not (job.folder / "config.yaml").is_file():
        return config
    stored = run_spec.load(job.folder / "config.yaml").config.invocation
    if without(stored.overrides, CHANGEABLE_ON_RESUME) != without(config.invocation.overrides, CHANGEABLE_ON_RESUME):
        job.status, job.error = "failed", f"{job.folder} contains another job; resume a sweep with the same command"
        return None
    if stored.continued_with:
        continued = f"{job.folder} was continued separately with {shlex.join(stored.continued_with)}"
        job.status, job.error = "failed", f"{continued}: it does not compare with the other jobs"
        return None
    report = read_report(job.folder)
    if is_finished(report) or report.get("status") == "pruned":
        jobs.record_end(job, exit_codes.FINISHED, "")
        return None
    return config


def _composer(loader: ConfigLoader, sweep_config: DictConfig, number: int = 0) -> Callable[[list[str]], DictConfig]:
    """Return a function that composes the configuration of a job from its overrides."""

    def compose(overrides: list[str]) -> DictConfig:
        tree = loader.load_sweep_config(sweep_config, overrides)
        with open_dict(tree):
            tree.hydra.job.num = number
        return tree

    return compose


def _resume_command(folder: Path) -> str:
    """The command line of this process, with the sweep's folder and resume=auto."""
    own = ("hydra.sweep.dir=", "resume=")
    given = [argument for argument in sys.argv[1:] if not argument.startswith(own)]
    return shlex.join(["python", "train.py", *given, override("hydra.sweep.dir", str(folder)), "resume=auto"])


def _job_return(job: Job) -> JobReturn:
    result = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
    result.return_value = job.watched
    return result
