"""Train: from a prepared run to its report, with a LightningModule, a LightningDataModule and a Trainer."""

import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch

from callbacks.best import find_best
from callbacks.checkpoint import is_complete
from callbacks.ending import stop_reason
from callbacks.failing_callbacks import is_added, raising_callback
from callbacks.interrupt import Interrupt, StoppedNowError
from callbacks.progress_marks import ProgressMarks
from callbacks.report import Report
from gpt2lab.errors import ExportError, InputError
from gpt2lab.settings import DataFacts
from gpt2lab.storage.atomic_files import full_disk_message
from gpt2lab.storage.checkpoint_ledger import checkpoint_step
from gpt2lab.system.determinism import use_deterministic_algorithms
from gpt2lab.system.heartbeat import Heartbeat
from gpt2lab.system.malloc_tuning import keep_freed_memory
from launch import exit_codes, rank_environment
from launch.config.run_dir import RunDirectory, kept_checkpoint_message
from launch.config.run_spec import PreparedSpec, RunSpec
from launch.logging_setup import silence_cpu_profiler
from launch.run import build, disk_space, memory_limit, run_panels

log = logging.getLogger(__name__)


def train(
    spec: PreparedSpec, data: Any, facts: DataFacts, directory: RunDirectory, heartbeat: Heartbeat | None = None
) -> dict[str, Any]:
    """Build everything and train in this process, which is the only one or one rank of several.

    Args:
        heartbeat: of one rank of several.

    Returns:
        The report, and `watched`, the value of the metric that the run is judged by, for the exported weights.

    Raises:
        InputError: configuration and data do not fit.
        exit_codes.Exit: a signal stopped the run.
    """
    set_up_process(spec)
    checkpoint = directory.newest_checkpoint()
    module = build.task_module(spec, facts, is_resumed=checkpoint is not None)
    with exit_codes.exit_on_signal(), disk_space.convert_full_disk(directory):
        folder = directory.enter(spec, is_resumed=checkpoint is not None)
        if rank_environment.is_main_process():
            run_panels.show_start(spec, facts, folder, checkpoint)
        with _discarding_untrained(directory, module):
            callbacks = build.callbacks(spec, folder, facts)
            if heartbeat is not None:
                callbacks.insert(0, ProgressMarks(heartbeat))
            completed = 0 if checkpoint is None else checkpoint_step(checkpoint)
            trainer = build.trainer(spec, folder, callbacks, build.loggers(spec, folder, completed))
            with memory_limit.convert_out_of_memory(spec, folder):
                _fit(trainer, module, data, checkpoint)
    return _outcome(trainer, folder)


def set_up_process(spec: RunSpec) -> None:
    """Set threads, memory allocation and deterministic algorithms of this process."""
    torch.set_num_threads(spec.machine.threads)
    if spec.machine.accelerator == "cpu":
        keep_freed_memory()
        silence_cpu_profiler()
    use_deterministic_algorithms(spec.config.trainer.get("deterministic"))


@contextmanager
def _discarding_untrained(directory: RunDirectory, module: lightning.LightningModule) -> Iterator[None]:
    """Delete the directory of a run that ends before its first step; of another the message names its checkpoint."""
    try:
        yield
    except (InputError, exit_codes.Exit) as error:
        if module.global_step == 0:
            directory.discard()
        elif isinstance(error, exit_codes.Exit) and rank_environment.is_main_process() and directory.path is not None:
            error.message += f" {kept_checkpoint_message(directory.path, module.settings.steps, module.global_step)}"
        raise


def _fit(trainer: lightning.Trainer, module: lightning.LightningModule, data: Any, checkpoint: Path | None) -> None:
    """Train. A failure after the last state is saved is a warning, unless the export holds another model."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except StoppedNowError:
        raise exit_codes.Exit(exit_codes.INTERRUPTED, "Stopped at once, without saving.") from None
    except ExportError:
        raise
    except (Exception, SystemExit) as error:
        _call_later_callbacks(trainer, error)
        if not is_complete(trainer):
            if isinstance(error, exit_codes.Exit | Exception):
                raise
            if stop_reason(trainer):  # Lightning exits after a KeyboardInterrupt that a callback has raised
                return
            raise exit_codes.Exit(exit_codes.FAILED, f"A callback has ended the program: {error!r}.") from None
        reason = full_disk_message(error) or f"{type(error).__name__}: {error}"
        log.warning("Training is complete and saved, but a later step failed: %s", reason.partition("\n")[0])


def _call_later_callbacks(trainer: lightning.Trainer, error: BaseException) -> None:
    """Let the callbacks save and report which come after an added one that has failed in `on_exception`."""
    callback, hook = raising_callback(error)
    if hook != "on_exception" or error.__context__ is None:
        return
    for later in trainer.callbacks[trainer.callbacks.index(callback) + 1 :]:
        if not is_added(later):
            later.on_exception(trainer, trainer.lightning_module, error.__context__)


def _outcome(trainer: lightning.Trainer, folder: Path) -> dict[str, Any]:
    """Return the report.

    Raises:
        exit_codes.Exit: a signal stopped the run.
    """
    report = next((callback.content for callback in trainer.callbacks if isinstance(callback, Report)), {})
    reason = next((callback.reason for callback in trainer.callbacks if isinstance(callback, Interrupt)), "")
    if reason:
        codes = {"SIGINT": exit_codes.INTERRUPTED, "SIGTERM": exit_codes.STOPPED, "SIGUSR1": exit_codes.STOPPED}
        quoted = shlex.quote(str(folder))
        message = (
            f"Stopped by {reason} after step {trainer.global_step}. Continue with: python train.py resume={quoted}"
        )
        raise exit_codes.Exit(codes.get(reason, exit_codes.FAILED), message if trainer.is_global_zero else "")
    metric = trainer.lightning_module.watched_metric
    # A run with no step left has only the former
    metrics = {**report.get("metrics", {}), **find_best(trainer).exported_metrics(trainer)}
    return {"watched_metric": metric, **report, "watched": float(metrics[metric]) if metric in metrics else None}
