"""Checkpoint: save checkpoints between optimizer steps, with an export as a Hugging Face folder."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Trainer

from callbacks.best import find_best
from callbacks.checkpoint_io import BackgroundWrite, HeldCheckpoint, StreamingCheckpointIO
from callbacks.ending import is_pruned, run_status
from callbacks.export import Export, exported_step, measured_by_validation
from callbacks.failing_callbacks import is_added, raising_callback, save_without_failing
from callbacks.interrupt import StoppedNowError
from callbacks.loggers.protocols import TakesModels
from callbacks.throughput import EXPORT, SAVE, outside_training_time
from gpt2lab.data.batch import Batch
from gpt2lab.errors import RunError
from gpt2lab.storage.atomic_files import input_error_when_full, write_text
from gpt2lab.storage.checkpoint_ledger import (
    checkpoint_file,
    checkpoint_folder,
    commit_checkpoint,
    delete_checkpoint,
    drop_checkpoints_after,
    recovery_hint,
    scratch_file,
)
from gpt2lab.storage.metrics_csv import drop_metrics_after
from gpt2lab.storage.report_json import FINISHED
from gpt2lab.storage.tensor_file import write_tensor_file

log = logging.getLogger(__name__)

SETTINGS = "config.yaml"  # written by the launcher
HOOKS_AFTER_A_STEP = ("on_train_batch_end", "on_validation_end")


class Checkpoint(lightning.Callback):
    """Save every `every` steps and at the end of a fit, however it ends; one of the last callbacks.

    A step with a validation is saved after it; a run that is being stopped also saves before it. A pruned run is not
    saved at its end. Another thread writes while training continues; its error ends the run after the next step. The
    run directory's Hugging Face folder `hf` is written before the checkpoint is added to the ledger, so it is never
    older than the checkpoint. Under export=best it holds the weights of the best validation so far, whose checkpoint is
    saved and kept; a resumed run writes it again if the killed one left a later one.

    Args:
        every: steps between checkpoints.
        keep_last: number of checkpoints to keep.
        verify_export: whether to load the final export in a new process and compare logits.

    Attributes:
        card: facts of the model card that are known before training.
    """

    def __init__(self, every: int, keep_last: int = 2, verify_export: bool = True) -> None:
        self.every = every
        self.keep_last = keep_last
        self.verify_export = verify_export
        self.saved_step = self.attempted_step = -1
        self.has_ended = False
        self.run_dir = Path()
        self.card: Mapping[str, Any] = {}
        self._writing = BackgroundWrite()
        self._settings = ""

    def setup(self, trainer: Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self.run_dir = Path(trainer.default_root_dir)
        self.export = Export(self.run_dir, self.card)
        trainer.strategy.checkpoint_io = StreamingCheckpointIO(self.run_dir)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.saved_step = checkpoint["global_step"]

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        if pl_module.validation_is_due:
            self.saved_step = -1  # the pending validation changes the content of this step's checkpoint
        if trainer.is_global_zero:
            settings = self.run_dir / SETTINGS
            self._settings = settings.read_text(encoding="utf-8") if settings.is_file() else ""
            drop_checkpoints_after(self.run_dir, trainer.global_step)
            drop_metrics_after(self.run_dir, trainer.global_step)
            self.export.restore_best(trainer, pl_module)
        if trainer.strategy.broadcast(self.export.lacks_best(trainer)):
            find_best(trainer).forget()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if between_steps and self._writing.has_failed:
            self._raise_failed_write(trainer)
        is_stopped = trainer.should_stop and trainer.global_step < trainer.max_steps  # a cluster may kill it soon
        if between_steps and self._is_due(trainer) and (is_stopped or not _validation_follows(trainer)):
            self._save(trainer, pl_module)
        if between_steps and pl_module.logger_error is not None and trainer.world_size == 1:  # raised by the module
            pl_module.validation_is_due = _validation_follows(trainer)
            self._save(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        # A checkpoint saved before the validation lacks its results, which some tasks depend on.
        if self._is_due(trainer) or trainer.should_stop:
            with torch.inference_mode(mode=False), torch.no_grad():  # a trainer may validate in inference mode
                self._save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Save after an unscheduled end: early stopping, a time limit, or a later callback."""
        if self.saved_step != trainer.global_step and not is_pruned(trainer):
            self._save(trainer, pl_module)
        self._finish_last_write(trainer)
        self.has_ended = True

    def on_exception(self, trainer: Trainer, pl_module: lightning.LightningModule, exception: BaseException) -> None:
        """Save the last complete step of a run that fails; several ranks could not agree on it.

        A step is complete once all callbacks of this project have seen it. One whose loss is not finite is not saved.
        """
        with self._warning_of_failure(trainer):
            self._finish_write(trainer)
        is_saved = trainer.global_step in (0, self.saved_step, self.attempted_step)
        if is_saved or isinstance(exception, RunError | StoppedNowError) or trainer.world_size > 1:
            return
        callback, hook = raising_callback(exception)
        is_after_step = hook in HOOKS_AFTER_A_STEP and is_added(callback) and self._between_steps(trainer, callback)
        if trainer.validating and not is_after_step:
            pl_module.abandon_validation()
        elif pl_module.is_updating and not is_after_step:
            return
        elif pl_module.is_updating:
            pl_module.validation_is_due = _validation_follows(trainer)
        with self._warning_of_failure(trainer), torch.inference_mode(mode=False), torch.no_grad():
            self._save(trainer, pl_module)
            self._finish_write(trainer)

    @contextmanager
    def _warning_of_failure(self, trainer: Trainer) -> Iterator[None]:
        """Log an error of a save in a run that has failed already."""
        try:
            yield
        except Exception as error:
            log.warning("Step %d could not be saved either: %s", trainer.global_step, error)

    def _between_steps(self, trainer: Trainer, callback: lightning.Callback) -> bool:
        """Whether the step is complete and all callbacks of this project before the checkpoint have seen it."""
        skipped = trainer.callbacks[trainer.callbacks.index(callback) : trainer.callbacks.index(self)]
        return trainer.fit_loop.epoch_loop._accumulated_batches_reached() and all(map(is_added, skipped))

    def on_fit_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Verify the final export, also if a resumed run has no steps left."""
        if run_status(trainer) not in FINISHED:
            return
        if self.saved_step != trainer.global_step:  # a time limit of 0 ends a fit before `on_train_start`
            self._save(trainer, pl_module)
            self._finish_last_write(trainer)
        failure: Exception | None = None
        if trainer.is_global_zero:
            try:
                self._finish_export(trainer, pl_module)
            except Exception as error:
                failure = error
        reason = trainer.strategy.broadcast(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        if reason is not None:  # the ranks end together: the callbacks that follow need all of them
            raise RunError(f"The export has failed on the first rank: {reason}")

    def _finish_export(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Complete and verify the export; on the first rank."""
        self.export.restore_best(trainer, pl_module)
        if self.export.lacks_best(trainer):
            find_best(trainer).forget()
        self.export.repair(trainer, pl_module, is_of_this_process=self.attempted_step >= 0)
        if self.verify_export:
            with outside_training_time(trainer, EXPORT):
                self.export.verify()
        for logger in trainer.loggers:
            if isinstance(logger, TakesModels):
                logger.log_model(self.export.folder)

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        due = step % self.every == 0 or step == trainer.max_steps or trainer.should_stop
        return (due or exported_step(trainer) == step) and step != self.saved_step

    def _save(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Save a checkpoint and the export; collective. Rank 0 writes, in another thread unless weights are sharded."""
        step = trainer.global_step
        with outside_training_time(trainer, SAVE), self._full_disk_named(step):
            self._raise_failed_write(trainer)
            self.attempted_step = step
            checkpoint_folder(self.run_dir).mkdir(parents=True, exist_ok=True)
            if trainer.is_global_zero:
                self._restore_settings()
                delete_checkpoint(scratch_file(self.run_dir, step))
            save = self._save_sharded if pl_module.is_sharded else self._save_whole
            failure = save(trainer, pl_module, exported_step(trainer))
        self.saved_step = step
        if failure is not None:
            raise failure

    def _restore_settings(self) -> None:
        """Write `config.yaml` again if the run directory was deleted or moved; no run is resumed without it."""
        file = self.run_dir / SETTINGS
        if self._settings and not file.exists():
            log.warning(
                "%s was deleted or moved during training; the run continues in a new folder there.", self.run_dir
            )
            write_text(file, self._settings)

    def _save_sharded(
        self, trainer: Trainer, pl_module: lightning.LightningModule, best_step: int | None
    ) -> Exception | None:
        """Save the weights of all ranks and the export; return the error of an added callback without its state."""
        step = trainer.global_step
        scratch = scratch_file(self.run_dir, step)
        try:
            failure = save_without_failing(trainer, scratch)
            if best_step in (None, step):
                with outside_training_time(trainer, EXPORT), self._full_disk_named():
                    self.export.write_gathered(trainer, pl_module)
            if trainer.is_global_zero:
                commit_checkpoint(self.run_dir, step, self.keep_last, best_step)
        finally:
            if trainer.is_global_zero:
                delete_checkpoint(scratch)
        trainer.strategy.barrier("checkpoint recorded")
        return failure

    def _save_whole(
        self, trainer: Trainer, pl_module: lightning.LightningModule, best_step: int | None
    ) -> Exception | None:
        """Copy the state and let another thread write it; return the error of an added callback without its state."""
        step, held, measured = trainer.global_step, HeldCheckpoint(), measured_by_validation(trainer.callback_metrics)
        failure = save_without_failing(trainer, scratch_file(self.run_dir, step), held)

        def write() -> None:
            scratch = scratch_file(self.run_dir, step)
            with self._full_disk_named(step), torch.no_grad():
                try:
                    write_tensor_file(held.content, scratch)
                    if best_step in (None, step):
                        with self._full_disk_named():
                            self.export.write_stored(pl_module, held.content, step, measured)
                    commit_checkpoint(self.run_dir, step, self.keep_last, best_step)
                finally:
                    delete_checkpoint(scratch)

        if trainer.is_global_zero:
            self._writing.start(write)
        return failure

    def _finish_write(self, trainer: Trainer) -> None:
        """Wait until the last saved step is on the disk.

        Raises:
            InputError: the disk is full.
            Exception: it could not be written.
        """
        if self._writing.is_pending:
            with outside_training_time(trainer, SAVE):
                self._raise_failed_write(trainer)

    def _finish_last_write(self, trainer: Trainer) -> None:
        """Wait on every rank, whose later callbacks read the export; collective."""
        self._finish_write(trainer)
        trainer.strategy.barrier("checkpoint recorded")

    def _raise_failed_write(self, trainer: Trainer) -> None:
        """Wait for the write and raise its error, after which the present step is not saved."""
        try:
            self._writing.wait()
        except BaseException:
            self.saved_step, self.attempted_step = -1, trainer.global_step
            raise

    def _full_disk_named(self, step: int | None = None) -> AbstractContextManager[None]:
        """Name what a full disk leaves unwritten: the checkpoint of a step, or the export."""
        name = f"the export {self.export.folder}"
        if step is not None:
            name = f"the checkpoint of step {step}, {checkpoint_file(self.run_dir, step)}"
        return input_error_when_full(name, lambda: recovery_hint(self.run_dir))


def is_complete(trainer: Trainer) -> bool:
    """Whether training has ended and its last state is saved, so that a later failure leaves the run complete."""
    if is_pruned(trainer):
        return True
    step = trainer.global_step
    if trainer.lightning_module.validation_is_due:
        return False
    return any(
        callback.saved_step == step and (callback.has_ended or trainer.should_stop or step >= trainer.max_steps)
        for callback in trainer.callbacks
        if isinstance(callback, Checkpoint)
    )


def _validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning is about to validate after this step; it decides by interval and by `should_stop`."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
