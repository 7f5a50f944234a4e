"""Job: one run from a checked Config to its report; as a program, a run or one of its ranks in a process of its own.

python -m launch.running.job SPEC PARENT          a job of a sweep: SPEC is a config.yaml, PARENT whom it dies with
python -m launch.running.job SPEC PARENT --rank   one rank of a run on several devices
"""

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from gpt2lab.errors import InputError
from launch import answer, noise
from launch.configuration import checks, config
from launch.configuration.config import Config
from launch.running import baseline, children, resolve, resume, run_folders, space

log = logging.getLogger(__name__)

ERROR_FILE = "error.txt"


def run_job(asked: Config) -> dict[str, Any]:
    """Resolve what is left open, prepare data, make the run directory, train; with plan=true only say what that takes.

    Returns:
        The report, and `watched`, the last value of the metric that says how good the run is.

    Raises:
        InputError: a mistake in configuration or input; then no run directory is left behind.
        answer.Ended: stopped by a signal, after saving.
    """
    noise.settle_noise()
    taken_up = resume.taken_up(asked)
    settings = taken_up or asked
    if taken_up is None:
        run_folders.check_wanted(settings)
        resolve.resolve(settings)
    from launch.configuration import automatic
    from launch.running import build

    noise.settle_library_noise()
    if settings.record.world_size == 0:
        automatic.settle(settings, automatic.free_memory(settings))
    if settings.plan:
        from launch.planning.plan import plan_of

        print(plan_of(settings), flush=True)
        return {"watched": None}
    data = build.data_module(settings)
    facts = data.prepare()
    resume.check_data(settings, facts.hash)
    if taken_up is None:
        settings.record.baseline_loss = baseline.loss_of_baseline(settings, facts)
    vocab_size = resolve.vocabulary(settings, facts)
    if settings.record.compile_head is None:
        settings.record.compile_head = automatic.compiling_the_head_pays(settings)
    settings.compile = automatic.compile_pays(settings, vocab_size)
    checks.check_heads(settings.model.n_embd or 0, settings.model.n_head or 1)
    space.check(settings, vocab_size)
    _note_planned_memory(settings, vocab_size)
    if settings.task_name == "distill":
        started = time.monotonic()
        facts = _teacher_at_work(settings, data, facts)
        settings.record.teacher_seconds = round(time.monotonic() - started, 2)
    if settings.record.world_size > 1:
        from launch.running import ranks

        report = ranks.run(settings, is_new=taken_up is None)
    else:
        report = train(settings, data, facts, is_new=taken_up is None)
    print(closing_line(report, settings.run_dir or ""), flush=True)
    return report


def _note_planned_memory(settings: Config, vocab_size: int) -> None:
    """What the run is expected to take, for its report; a warning where there is less."""
    from launch.planning.free_memory import free_bytes
    from launch.planning.plan import planned_memory
    from launch.planning.run_sizes import room_of_a_device

    plan = planned_memory(settings, vocab_size)
    settings.record.planned_memory = {"process": plan.process, "peak": plan.peak}
    room = room_of_a_device(settings, free_bytes(settings.accelerator), plan.process)
    if room is not None and plan.peak > room:
        log.warning(
            "This run takes about %.1f GB of each device, and %.1f GB are free; plan=true shows what saves memory.",
            plan.peak / 1e9,
            room / 1e9,
        )


def _teacher_at_work(settings: Config, data: Any, facts: Any) -> Any:
    """Let the teacher write or read what it does once for all students; returns the facts of what they train on."""
    if settings.sequences.name == "seqkd":
        from launch.running import teacher_writing

        teacher_writing.write(settings, data, facts)
        facts = teacher_writing.put_in(settings, data, facts)
    if settings.teacher_cache.name != "none":
        from launch.running import cached_teacher

        cached_teacher.fill(settings, data, facts)
    return facts


def closing_line(report: dict[str, Any], folder: str) -> str:
    """What the terminal shows last: how good the run is and where it lies."""
    score = f"{report['watched_metric']} {report['watched']:.4f} · " if report["watched"] is not None else ""
    return f"finished: {score}{folder}/report.html"


def train(settings: Config, data: Any, facts: Any, is_new: bool) -> dict[str, Any]:
    """Build everything and train in this process, which is the only one or one rank of several."""
    import torch

    from gpt2lab.host_memory import keep_freed_memory
    from launch.running import build

    torch.set_num_threads(int(settings.threads))
    if settings.accelerator == "cpu":
        keep_freed_memory()
    module = build.task_module(settings, facts, resolve.vocabulary(settings, facts))
    trainer = None
    with answer.cleaning_up():
        folder = _folder(settings, is_new)
        try:
            observers = build.callbacks(settings, folder, facts)
            trainer = build.trainer(settings, folder, observers, build.loggers(settings, folder))
            _fit(trainer, module, data, resume.checkpoint(settings))
        except (InputError, answer.Ended):
            if is_new and (trainer is None or trainer.global_step == 0):
                run_folders.remove(folder)  # a run without a step is no run
            raise
    return _outcome(trainer, folder)


def _folder(settings: Config, is_new: bool) -> Path:
    """Make the run directory and write config.yaml into it, unless the run goes on in the one it has."""
    if settings.record.world_size > 1:
        return Path(settings.run_dir or "")  # the parent has made it
    folder = run_folders.make(settings) if is_new else Path(settings.run_dir or "")
    settings.run_dir = str(folder)
    config.save(settings, folder / "config.yaml")
    return folder


def _fit(trainer: Any, module: Any, data: Any, checkpoint: Path | None) -> None:
    from callbacks.interrupt import StoppedNowError

    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    except StoppedNowError:
        raise answer.Ended(answer.INTERRUPTED, "Stopped at once, without saving.") from None


def _outcome(trainer: Any, folder: Path) -> dict[str, Any]:
    """The report, or the orderly end that a signal brought about."""
    from callbacks.interrupt import Interrupt
    from callbacks.report import Report

    report = next((callback.content for callback in trainer.callbacks if isinstance(callback, Report)), {})
    reason = next((callback.reason for callback in trainer.callbacks if isinstance(callback, Interrupt)), "")
    if reason:
        codes = {"SIGINT": answer.INTERRUPTED, "SIGTERM": answer.STOPPED, "SIGUSR1": answer.STOPPED}
        message = (
            f"Stopped by {reason} after step {trainer.global_step}. Continue with: python train.py resume={folder}"
        )
        raise answer.Ended(codes.get(reason, answer.FAILED), message if trainer.is_global_zero else "")
    watched = trainer.lightning_module.watched_metric
    metrics = {**report.get("metrics", {}), **trainer.callback_metrics}  # a run with no step left has only the former
    return {"watched_metric": watched, **report, "watched": float(metrics[watched]) if watched in metrics else None}


def _run_rank(spec: Path) -> None:
    rank = int(os.environ["RANK"])
    noise.settle_noise(speaks=rank == 0)
    settings = config.load(spec)
    from launch.running import build, ranks

    noise.settle_library_noise()
    try:
        data = build.data_module(settings)
        facts = data.prepare()
        if settings.record.teacher_text:
            from launch.running import teacher_writing

            facts = teacher_writing.put_in(settings, data, facts)
        watched = train(settings, data, facts, is_new=False)["watched"]
    except answer.Ended as ended:
        # Exit code 0: to the parent any other says that this rank died, and it would kill the rest while they save.
        ranks.record_outcome(int(ended.code or 0), ended.message)
    except Exception as error:
        mistake = answer.as_mistake(error)
        if mistake is None:
            raise
        ranks.record_outcome(answer.MISTAKE, f"error: {mistake}")
    else:
        ranks.record_outcome(answer.FINISHED, watched=watched)


def _run_for_a_sweep(spec: Path) -> None:
    """The sweep's process reads from beside the spec why its job failed."""
    try:
        run_job(config.load(spec))
    except Exception as error:
        mistake = answer.as_mistake(error)
        spec.with_name(ERROR_FILE).write_text(str(mistake or f"{type(error).__name__}: {error}"), encoding="utf-8")
        raise


def _program(spec: str, parent: str, *flags: str) -> None:
    children.die_with_parent(int(parent))
    if "--rank" in flags:
        _run_rank(Path(spec))
    else:
        _run_for_a_sweep(Path(spec))


if __name__ == "__main__":
    answer.end(lambda: _program(*sys.argv[1:]))
