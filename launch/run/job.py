"""Job: one run from a checked Config to its report; as a program, a run or one of its ranks in a process of its own.

python -m launch.run.job SPEC PARENT              a job of a sweep: SPEC is a config.yaml, PARENT whom it dies with;
                                                  --cores 0,1 keeps it and its ranks to these
                                                  --allow-targets a,b.C hands on the permissions of who starts it
python -m launch.run.job SPEC PARENT --rank   one rank of a run on several devices
"""

import logging
import os
import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from gpt2lab.errors import ExportError, InputError
from gpt2lab.reports import side_files
from gpt2lab.settings import DataFacts
from gpt2lab.storage.atomic_files import full_disk_message
from gpt2lab.system.heartbeat import Folder, Heartbeat
from launch import exit_codes, logging_setup, rank_environment
from launch.checks import baseline, checks
from launch.config import run_dir, schema
from launch.config.run_dir import RunDirectory
from launch.config.schema import Config
from launch.distributed import child_processes, multi_node
from launch.run import disk_space, resolve, resume

ERROR_FILE = "error.txt"

log = logging.getLogger("launch.run.job")  # not __name__, which is __main__ in a job's own process


def run_job(asked: Config) -> dict[str, Any]:
    """Resolve what is left open, prepare data, make the run directory, train; with plan=true only say what that takes.

    Returns:
        The report, and `watched`, the last value of the metric that says how good the run is.

    Raises:
        InputError: a mistake in configuration or input; then no run directory is left behind.
        answer.Ended: stopped by a signal, after saving.
    """
    logging_setup.settle_noise(speaks=rank_environment.is_first())
    with closing(RunDirectory()) as directory:
        if rank_environment.is_cluster_rank():
            return _run_one_of_many(asked, directory)
        return _run_alone(asked, directory)


def _run_alone(asked: Config, directory: RunDirectory) -> dict[str, Any]:
    settings = _settled(asked, directory)
    if settings.plan:
        from launch.run.plan_report import plan_of

        print(plan_of(settings), flush=True)
        return {"watched": None}
    data, facts = _prepared(settings)
    if settings.record.world_size > 1 or settings.max_restarts:
        from launch.distributed import local_ranks

        with disk_space.told_with_checkpoint(settings):
            report = local_ranks.run(settings, directory)
    else:
        report = train(settings, data, facts, directory)
    print(closing_line(report, settings.run_dir or ""), flush=True)
    return report


def _settled(asked: Config, directory: RunDirectory) -> Config:
    """The configuration with nothing left open. An existing run's directory is locked before it is read."""
    folder = resume.existing_folder(asked)
    if folder is not None and not asked.plan:
        directory.open(folder)
    stored = resume.taken_up(asked, folder)
    settings = stored or asked
    if stored is None:
        if folder is None:
            run_dir.check_wanted(settings)
        resolve.resolve(settings)
    from launch.run import auto_settings

    logging_setup.settle_library_noise()
    if settings.record.world_size == 0:
        auto_settings.settle(settings, auto_settings.free_memory(settings))
    if stored is not None and settings.resume:
        resume.warn_of_other_masks(settings)
    return settings


def _prepared(settings: Config) -> tuple[Any, DataFacts]:
    """(data module, facts of its data), with what depends on these noted down in the settings."""
    from launch.run import auto_settings, build
    from launch.run.plan_report import note_planned_memory

    logging_setup.settle_library_noise()  # that of Lightning, which comes with the import above
    if settings.resume is not None:
        side_files.repair(Path(settings.run_dir or ""))
    data = build.data_module(settings)
    facts = data.prepare()
    resume.check_data(settings, facts.hash)
    if settings.resume is None:
        settings.record.baseline_loss = baseline.loss_of_baseline(settings, facts)
    vocab_size = resolve.vocabulary(settings, facts)
    if settings.record.compile_head is None:
        settings.record.compile_head = auto_settings.compiling_the_head_pays(settings)
    settings.compile = auto_settings.compile_pays(settings, vocab_size)
    checks.check_heads(settings.model.n_embd or 0, settings.model.n_head or 1)
    disk_space.check(settings, vocab_size)
    note_planned_memory(settings, vocab_size)
    if settings.task_name == "distill":
        started = time.monotonic()
        facts = _teacher_at_work(settings, data, facts)
        settings.record.teacher_seconds = round(time.monotonic() - started, 2)
    return data, facts


def _run_one_of_many(asked: Config, directory: RunDirectory) -> dict[str, Any]:
    """This process is one rank: the first prepares everything, the others do as it says."""
    multi_node.settle_environment()
    meeting = multi_node.Meeting(asked.rank_timeout)
    if meeting.rank == 0:
        with meeting.preparing():
            multi_node.take_numbers(asked)
            settings = _settled(asked, directory)
            data, facts = _prepared(settings)
            folder = directory.enter(settings)
            settings.run_dir = str(folder.absolute())
            schema.save(settings, folder / run_dir.CONFIG)
        meeting.tell(settings)
    else:
        settings = meeting.told()
        settings.allow_targets = asked.allow_targets
        directory = RunDirectory(given=Path(settings.run_dir or ""))
        data, facts = _data_as_told(settings)
    try:
        with meeting.training(settings) as heartbeat:
            report = train(settings, data, facts, directory, heartbeat)
    except RuntimeError as error:
        if not multi_node.is_lost_connection(error):
            raise
        raise _lost_connection(error, meeting.rank, Path(settings.run_dir or "")) from None
    if meeting.rank == 0:
        print(closing_line(report, settings.run_dir or ""), flush=True)
    return report


def _lost_connection(error: Exception, rank: int, folder: Path) -> exit_codes.Ended:
    """The end of a rank that torchrun or srun has started, after another one has ended."""
    from launch.distributed import local_ranks

    local_ranks.log_lost_connection(error, folder)
    if rank > 1:  # rank 0 or, where that is the one that ended, rank 1 prints it
        return exit_codes.Ended(exit_codes.FAILED)
    told = f"The run failed: rank {rank} lost its connection to a rank that ended; see {folder / local_ranks.LOGS}."
    return exit_codes.Ended(exit_codes.FAILED, f"{run_dir.kept_checkpoint_message(folder)}\n{told}")


def _data_as_told(settings: Config) -> tuple[Any, DataFacts]:
    """Data module and facts of its data, on a rank that is told a settled configuration."""
    from launch.run import build

    logging_setup.settle_library_noise()
    data = build.data_module(settings)
    facts = data.prepare()
    multi_node.check_data(settings, facts.hash)
    if settings.record.teacher_text:
        from launch.run import generate_teacher_text

        facts = generate_teacher_text.put_in(settings, data, facts)
    return data, facts


def _teacher_at_work(settings: Config, data: Any, facts: Any) -> Any:
    """Let the teacher write or read what it does once for all students; returns the facts of what they train on."""
    if settings.sequences.name == "seqkd":
        from launch.run import generate_teacher_text

        generate_teacher_text.write(settings, data, facts)
        facts = generate_teacher_text.put_in(settings, data, facts)
    if settings.teacher_cache.name != "none":
        from launch.run import fill_teacher_cache

        fill_teacher_cache.fill(settings, data, facts)
    return facts


def closing_line(report: dict[str, Any], folder: str) -> str:
    """What the terminal shows last: how good the run is and where it lies."""
    score = f"{report['watched_metric']} {report['watched']:.4f} · " if report["watched"] is not None else ""
    return f"{report.get('status', 'finished')}: {score}{folder}/report.html"


def train(
    settings: Config, data: Any, facts: Any, directory: RunDirectory, heartbeat: Heartbeat | None = None
) -> dict[str, Any]:
    """Build everything and train in this process, which is the only one or one rank of several.

    Args:
        heartbeat: of one rank of several.
    """
    import torch

    from callbacks.progress_marks import ProgressMarks
    from gpt2lab.system.malloc_tuning import keep_freed_memory
    from launch.run import build

    torch.set_num_threads(int(settings.threads))
    if settings.accelerator == "cpu":
        keep_freed_memory()
    module = build.task_module(settings, facts, resolve.vocabulary(settings, facts))
    trainer = None
    with exit_codes.cleaning_up(), disk_space.told_with_checkpoint(settings):
        folder = directory.enter(settings)
        try:
            observers = build.callbacks(settings, folder, facts)
            if heartbeat is not None:
                observers.insert(0, ProgressMarks(heartbeat))
            trainer = build.trainer(settings, folder, observers, build.loggers(settings, folder))
            _fit(trainer, module, data, resume.checkpoint(settings))
        except (InputError, exit_codes.Ended) as error:
            if trainer is None or trainer.global_step == 0:
                directory.discard()  # a run without a step is no run
            elif isinstance(error, exit_codes.Ended) and rank_environment.is_first():
                error.message += f" {run_dir.kept_checkpoint_message(folder, trainer.global_step if trainer else 0)}"
            raise
    return _outcome(trainer, folder)


def _fit(trainer: Any, module: Any, data: Any, checkpoint: Path | None) -> None:
    """Train. What fails after the last state is saved is a warning, except that the export holds another model."""
    from callbacks.checkpoint import is_complete
    from callbacks.interrupt import StoppedNowError

    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except StoppedNowError:
        raise exit_codes.Ended(exit_codes.INTERRUPTED, "Stopped at once, without saving.") from None
    except ExportError:
        raise
    except Exception as error:
        if not is_complete(trainer):
            raise
        reason = full_disk_message(error) or f"{type(error).__name__}: {error}"
        log.warning("Training is complete and saved, but a later step failed: %s", reason.partition("\n")[0])


def _outcome(trainer: Any, folder: Path) -> dict[str, Any]:
    """The report, or the orderly end that a signal brought about."""
    from callbacks.interrupt import Interrupt
    from callbacks.report import Report

    report = next((callback.content for callback in trainer.callbacks if isinstance(callback, Report)), {})
    reason = next((callback.reason for callback in trainer.callbacks if isinstance(callback, Interrupt)), "")
    if reason:
        codes = {"SIGINT": exit_codes.INTERRUPTED, "SIGTERM": exit_codes.STOPPED, "SIGUSR1": exit_codes.STOPPED}
        message = (
            f"Stopped by {reason} after step {trainer.global_step}. Continue with: python train.py resume={folder}"
        )
        raise exit_codes.Ended(codes.get(reason, exit_codes.FAILED), message if trainer.is_global_zero else "")
    watched = trainer.lightning_module.watched_metric
    metrics = {**report.get("metrics", {}), **trainer.callback_metrics}  # a run with no step left has only the former
    return {"watched_metric": watched, **report, "watched": float(metrics[watched]) if watched in metrics else None}


def _run_rank(spec: Path, allow_targets: list[str]) -> None:
    rank = int(os.environ["RANK"])
    heartbeat = Heartbeat(Folder(Path(os.environ[rank_environment.HEARTBEATS])), rank)
    logging_setup.settle_noise(speaks=rank == 0)
    settings = schema.load(spec)
    settings.allow_targets = allow_targets
    from launch.distributed import local_ranks

    try:
        data, facts = _data_as_told(settings)
        directory = RunDirectory(given=Path(settings.run_dir or ""))
        watched = train(settings, data, facts, directory, heartbeat)["watched"]
    except exit_codes.Ended as ended:
        # Exit code 0: to the parent any other says that this rank died, and it would kill the rest while they save.
        local_ranks.record_outcome(int(ended.code or 0), ended.message)
        heartbeat.done()
    except Exception as error:
        mistake = exit_codes.as_mistake(error)
        if mistake is None:
            if local_ranks.is_mistaken():
                raise exit_codes.Ended(exit_codes.FAILED) from None  # of another rank's mistake, which will be told
            local_ranks.record_failure()
            if multi_node.is_timeout(error):
                heartbeat.waited_in_vain()
            if rank == 0 and multi_node.is_lost_connection(error):
                local_ranks.log_lost_connection(error, Path(settings.run_dir or ""))
                raise exit_codes.Ended(exit_codes.FAILED) from None
            raise
        local_ranks.record_outcome(exit_codes.MISTAKE, f"error: {mistake}")
        raise exit_codes.Ended(exit_codes.MISTAKE) from None  # the others may wait for this rank
    else:
        try:
            local_ranks.record_outcome(exit_codes.FINISHED, watched=watched)
        except OSError as error:  # the run is complete; the parent reads its report instead
            log.warning("The outcome of this run could not be written: %s", error)
        heartbeat.done()


def _run_for_a_sweep(spec: Path, allow_targets: list[str]) -> None:
    """The sweep's process reads from beside the spec why its job failed."""
    told = spec.with_name(ERROR_FILE)
    try:
        settings = schema.load(spec)
        settings.allow_targets = allow_targets
        run_job(settings)
    except exit_codes.Ended as ended:
        if ended.code in (exit_codes.FAILED, exit_codes.MISTAKE):  # of several ranks, which have told of it already
            told.write_text(ended.message.removeprefix("error: "), encoding="utf-8")
        raise
    except Exception as error:
        mistake = exit_codes.as_mistake(error)
        told.write_text(str(mistake or f"{type(error).__name__}: {error}"), encoding="utf-8")
        raise


def _program(spec: str, parent: str, *flags: str) -> None:
    child_processes.die_with_parent(int(parent))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, exit_codes.SIGNALS)  # Ray blocks some in all that it starts
    if "--cores" in flags:  # before torch counts them
        os.sched_setaffinity(0, [int(core) for core in flags[flags.index("--cores") + 1].split(",")])
    permitted = flags[flags.index("--allow-targets") + 1] if "--allow-targets" in flags else ""
    run = _run_rank if "--rank" in flags else _run_for_a_sweep
    run(Path(spec), [target for target in permitted.split(",") if target])


if __name__ == "__main__":
    exit_codes.end(lambda: _program(*sys.argv[1:]))
