"""Checkpoint: save checkpoints between optimizer steps, with an export as a Hugging Face folder."""

import logging
import tempfile
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.trainer import call
from transformers import GPT2LMHeadModel

from callbacks.best import find_best
from callbacks.ending import is_pruned, run_status
from callbacks.interrupt import StoppedNowError
from callbacks.loggers.protocols import TakesModels
from callbacks.throughput import EXPORT, SAVE, outside_training_time
from gpt2lab.data.batch import Batch
from gpt2lab.errors import InputError, RunError
from gpt2lab.metric_names import MEASURED_BY_VALIDATION
from gpt2lab.reports.hf_folder import holds_model, verify_in_fresh_process, write_hf_folder
from gpt2lab.reports.model_card import STEPS, read_step
from gpt2lab.storage.atomic_files import input_error_when_full
from gpt2lab.storage.checkpoint_ledger import (
    checkpoint_file,
    checkpoint_folder,
    commit_checkpoint,
    delete_checkpoint,
    drop_checkpoints_after,
    is_intact,
    recovery_hint,
    scratch_file,
)
from gpt2lab.storage.metrics_csv import drop_metrics_after
from gpt2lab.storage.model_folder import resolve_model_folder
from gpt2lab.storage.report_json import FINISHED, read_report
from gpt2lab.storage.sharded_checkpoint import is_sharded, read_whole
from gpt2lab.storage.tensor_file import read_checkpoint_file, without_objects

log = logging.getLogger(__name__)

HOOKS_AFTER_A_STEP = ("on_train_batch_end", "on_validation_end")
HOOKS_OF_A_SAVE = {
    call._call_callbacks_state_dict.__code__: "state_dict",
    call._call_callbacks_on_save_checkpoint.__code__: "on_save_checkpoint",
}


class Checkpoint(lightning.Callback):
    """Save every `every` steps and at the end of a fit, however it ends; one of the last callbacks.

    A step with a validation is saved after it; a run that is being stopped also saves before it. A pruned run is not
    saved at its end. The run directory's Hugging Face folder `hf` is written before the checkpoint is added to the
    ledger, so it is never older than the checkpoint. Under export=best it holds the weights of the best validation so
    far, whose checkpoint is saved and kept; a resumed run writes it again if the killed one left a later one.

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

    def setup(self, trainer: Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self.run_dir = Path(trainer.default_root_dir)
        trainer.strategy.checkpoint_io = StreamingCheckpointIO(self.run_dir)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.saved_step = checkpoint["global_step"]

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        if pl_module.validation_is_due:
            self.saved_step = -1  # the pending validation changes the content of this step's checkpoint
        if trainer.is_global_zero:
            drop_checkpoints_after(self.run_dir, trainer.global_step)
            drop_metrics_after(self.run_dir, trainer.global_step)
            self._restore_best(trainer, pl_module)
        if trainer.strategy.broadcast(self._lacks_best(trainer)):
            find_best(trainer).forget()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        is_stopped = trainer.should_stop and trainer.global_step < trainer.max_steps  # a cluster may kill it soon
        if between_steps and self._is_due(trainer) and (is_stopped or not _validation_follows(trainer)):
            self._save(trainer, pl_module)
        if between_steps and pl_module.logger_error is not None and trainer.world_size == 1:  # raised by the module
            pl_module.validation_is_due = _validation_follows(trainer)
            self._save(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        # A checkpoint saved before the validation lacks its results, which some tasks depend on.
        if self._is_due(trainer) or trainer.should_stop:
            with torch.inference_mode(mode=False), torch.no_grad():  # validation runs in inference mode
                self._save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Save after an unscheduled end: early stopping, a time limit, or a later callback."""
        if self.saved_step != trainer.global_step and not is_pruned(trainer):
            self._save(trainer, pl_module)
        self.has_ended = True

    def on_exception(self, trainer: Trainer, pl_module: lightning.LightningModule, exception: BaseException) -> None:
        """Save the last complete step of a run that fails; several ranks could not agree on it.

        A step is complete once all callbacks of this project have seen it. One whose loss is not finite is not saved.
        """
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
        try:
            with torch.inference_mode(mode=False), torch.no_grad():
                self._save(trainer, pl_module)
        except Exception as error:
            log.warning("Step %d could not be saved either: %s", trainer.global_step, error)

    def _between_steps(self, trainer: Trainer, callback: lightning.Callback) -> bool:
        """Whether the step is complete and all callbacks of this project before the checkpoint have seen it."""
        skipped = trainer.callbacks[trainer.callbacks.index(callback) : trainer.callbacks.index(self)]
        return trainer.fit_loop.epoch_loop._accumulated_batches_reached() and all(map(is_added, skipped))

    def on_fit_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Verify the final export, also if a resumed run has no steps left."""
        folder = self.run_dir / "hf"
        if run_status(trainer) not in FINISHED:
            return
        if self.saved_step != trainer.global_step:  # a time limit of 0 ends a fit before `on_train_start`
            self._save(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        self._restore_best(trainer, pl_module)
        if self._lacks_best(trainer):
            find_best(trainer).forget()
        self._repair_export(trainer, pl_module)
        if self.verify_export:
            with outside_training_time(trainer, EXPORT):
                self._verify(folder)
        for logger in trainer.loggers:
            if isinstance(logger, TakesModels):
                logger.log_model(folder)

    def _verify(self, folder: Path) -> None:
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
        length = min(model.config.n_positions, 64)
        ids = torch.arange(2 * length).view(2, length) * 7919 % model.config.vocab_size  # (2, T) any fixed ids
        with torch.no_grad():
            difference = verify_in_fresh_process(folder, ids, model(ids).logits)
        log.info("%s loads with transformers only; largest difference of logits %.1e", folder, difference)

    def _has_valid_export(self) -> bool:
        try:
            return resolve_model_folder(str(self.run_dir / "hf"), "init") == (self.run_dir / "hf").resolve()
        except InputError:
            return False

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        due = step % self.every == 0 or step == trainer.max_steps or trainer.should_stop
        return (due or self._exported_step(trainer) == step) and step != self.saved_step

    def _exported_step(self, trainer: Trainer) -> int | None:
        """Step of the best validation, whose weights are exported; None: the last weights are."""
        best = find_best(trainer)
        return best.step if best.exports_best else None

    def _save(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Save a checkpoint and the export; collective, rank 0 writes."""
        self.attempted_step = step = trainer.global_step
        scratch = scratch_file(self.run_dir, step)
        name, best_step = checkpoint_file(self.run_dir, step), self._exported_step(trainer)
        with (
            outside_training_time(trainer, SAVE),
            input_error_when_full(f"the checkpoint of step {step}, {name}", lambda: recovery_hint(self.run_dir)),
        ):
            checkpoint_folder(self.run_dir).mkdir(parents=True, exist_ok=True)
            if trainer.is_global_zero:
                delete_checkpoint(scratch)
            try:
                failure = _save_without_failing(trainer, scratch)
                if best_step in (None, step):
                    with input_error_when_full(
                        f"the export {self.run_dir / 'hf'}", lambda: recovery_hint(self.run_dir)
                    ):
                        self._export(trainer, pl_module)
                if trainer.is_global_zero:
                    commit_checkpoint(self.run_dir, step, self.keep_last, best_step)
            finally:
                if trainer.is_global_zero:
                    delete_checkpoint(scratch)
            trainer.strategy.barrier("checkpoint recorded")
        self.saved_step = step
        if failure is not None:
            raise failure

    def _export(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Write `hf` from the weights that are in memory; collective."""
        with outside_training_time(trainer, EXPORT):
            model = pl_module.export_on_first_rank()
            if model is not None:
                card = self._card(model, trainer.global_step, pl_module.tokens_seen, trainer.callback_metrics)
                write_hf_folder(model, pl_module.tokenizer, self.run_dir / "hf", card, pl_module.export_adapter)
            elif pl_module.is_sharded:
                # Gathering the adapter is collective
                with tempfile.TemporaryDirectory(prefix=".adapter-", dir=self.run_dir) as unused:
                    pl_module.export_adapter(Path(unused))

    def _restore_best(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Write `hf` from the checkpoint of the best validation if it is of another step; on rank 0 only.

        A run that was killed between an export and its checkpoint has left the weights of a later step.
        """
        best, folder = find_best(trainer), self.run_dir / "hf"
        if not best.exports_best or best.step is None or read_step(folder) == best.step:
            return
        file = checkpoint_file(self.run_dir, best.step)
        if not is_intact(self.run_dir, file):
            log.warning(
                "%s is not of the best step %d, whose checkpoint is missing or damaged; later validations decide.",
                folder,
                best.step,
            )
            return
        stored = trainer.strategy.checkpoint_io.load_checkpoint(file)
        self._export_stored(pl_module, stored, best.step, best.metrics)

    def _repair_export(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Write `hf` again if it is missing or damaged; on rank 0 only.

        A process that had a step to make has written it; another one compares it with its checkpoint.
        """
        step, folder, is_valid = self._exported_step(trainer), self.run_dir / "hf", self._has_valid_export()
        metrics = find_best(trainer).metrics if step is not None else read_report(self.run_dir).get("metrics", {})
        step = trainer.global_step if step is None else step
        file = checkpoint_file(self.run_dir, step)
        if (is_valid and self.attempted_step >= 0) or not is_intact(self.run_dir, file):
            return
        stored = trainer.strategy.checkpoint_io.load_checkpoint(file)
        if is_valid and holds_model(folder, pl_module.stored_model(stored), pl_module.tokenizer):
            return
        log.warning("%s is missing or damaged and is written again.", folder)
        self._export_stored(pl_module, stored, step, metrics)

    def _export_stored(
        self, pl_module: lightning.LightningModule, stored: dict[str, Any], step: int, metrics: Mapping[str, Any]
    ) -> None:
        model = pl_module.stored_model(stored)
        card = self._card(model, step, stored["tokens_seen"], metrics)
        adapter = partial(pl_module.export_adapter, stored=stored)
        write_hf_folder(model, pl_module.tokenizer, self.run_dir / "hf", card, adapter)

    def _lacks_best(self, trainer: Trainer) -> bool:
        """Whether `hf` is not of the best validation, whose checkpoint is lost."""
        best_step = self._exported_step(trainer)
        return best_step is not None and read_step(self.run_dir / "hf") != best_step

    def _card(self, model: GPT2LMHeadModel, step: int, tokens_seen: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the facts of the model card; Report adds the errors of the scores at the end."""
        measured = {name: float(value) for name, value in metrics.items() if name.startswith(MEASURED_BY_VALIDATION)}
        facts = {"parameters": model.num_parameters(), STEPS: step, "tokens_seen": tokens_seen, "metrics": measured}
        return {"title": self.run_dir.name, **self.card, **facts}


class StreamingCheckpointIO(TorchCheckpointIO):
    """Checkpoint IO that writes directly to the file, not first to memory as Lightning's does, and reads shards.

    Args:
        run_dir: files outside of it are not removed; a ModelCheckpoint takes the names of its files from a checkpoint.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("wb") as file:
            torch.save(without_objects(checkpoint), file)

    def load_checkpoint(self, path: str | Path, *arguments: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return read_whole(Path(path)) if is_sharded(Path(path)) else read_checkpoint_file(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        if not Path(path).resolve().is_relative_to(self.run_dir.resolve()):
            log.warning("%s is kept, since it is outside the run directory.", path)
            return
        super().remove_checkpoint(path)


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


def _save_without_failing(trainer: Trainer, file: Path) -> Exception | None:
    """Save a checkpoint without the state of added callbacks that fail to give it; return the first such error."""
    callbacks, failure = trainer.callbacks, None
    try:
        while True:
            try:
                trainer.save_checkpoint(file, weights_only=False)
                return failure
            except Exception as error:
                callback, hook = raising_callback(error)
                if hook not in HOOKS_OF_A_SAVE.values() or not is_added(callback):
                    raise
                log.warning("Step %d is saved without the state of %s.", trainer.global_step, type(callback).__name__)
                trainer.callbacks = [one for one in trainer.callbacks if one is not callback]
                failure = failure or error
    finally:
        trainer.callbacks = callbacks


def raising_callback(error: BaseException) -> tuple[Any, str]:
    """Return the callback that raised the error and the hook that it raised it in; otherwise (None, "")."""
    found: tuple[Any, str] = None, ""
    for frame, _ in traceback.walk_tb(error.__traceback__):  # a hook of ours may call the hooks of a save
        if frame.f_code is call._call_callback_hooks.__code__:
            found = frame.f_locals["callback"], frame.f_locals["hook_name"]
        elif frame.f_code in HOOKS_OF_A_SAVE:
            found = frame.f_locals["callback"], HOOKS_OF_A_SAVE[frame.f_code]
    return found


def is_added(callback: lightning.Callback | None) -> bool:
    return callback is not None and type(callback).__module__.partition(".")[0] not in ("callbacks", "launch")
