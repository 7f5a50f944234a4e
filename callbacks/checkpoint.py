"""Checkpoint: save checkpoints between optimizer steps, with an export as a Hugging Face folder."""

import logging
import tempfile
import traceback
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.trainer import call
from transformers import GPT2LMHeadModel

from callbacks.ending import is_pruned, run_status
from callbacks.loggers.protocols import TakesModels
from callbacks.throughput import EXPORT, SAVE, outside_training_time
from gpt2lab.data.batch import Batch
from gpt2lab.errors import InputError
from gpt2lab.reports.hf_folder import verify_in_fresh_process, write_hf_folder
from gpt2lab.storage.atomic_files import input_error_when_full
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
from gpt2lab.storage.model_folder import resolve_model_folder
from gpt2lab.storage.sharded_checkpoint import is_sharded, read_whole
from gpt2lab.storage.tensor_file import read_checkpoint_file

log = logging.getLogger(__name__)

HOOKS_OF_VALIDATION = tuple(f"on_validation_{when}" for when in ("start", "epoch_start", "epoch_end"))
HOOKS_OF_VALIDATION += ("on_validation_batch_start", "on_validation_batch_end")
HOOKS_AFTER_A_STEP = ("on_train_batch_end", "on_validation_end")


class Checkpoint(lightning.Callback):
    """Save every `every` steps and at the end of a fit, however it ends; one of the last callbacks.

    A step with a validation is saved after it; a run that is being stopped also saves before it. A pruned run is not
    saved at its end. The run directory's Hugging Face folder `hf` is written before the checkpoint is added to the
    ledger, so it is never older than the checkpoint.

    Args:
        every: steps between checkpoints.
        keep_last: number of checkpoints to keep.
        verify_export: whether to load the final export in a new process and compare logits.
    """

    def __init__(self, every: int, keep_last: int = 2, verify_export: bool = True) -> None:
        self.every = every
        self.keep_last = keep_last
        self.verify_export = verify_export
        self.saved_step = -1
        self.has_ended = False
        self.run_dir = Path()

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

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        is_stopped = trainer.should_stop and trainer.global_step < trainer.max_steps  # a cluster may kill it soon
        if between_steps and self._is_due(trainer) and (is_stopped or not _validation_follows(trainer)):
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
        """Save a complete step after which an added callback raised an error; several ranks could not agree on it."""
        callback, hook = _raising_callback(exception)
        is_saved = trainer.global_step in (0, self.saved_step)
        if not isinstance(exception, Exception) or trainer.world_size > 1 or is_saved or not _is_added(callback):
            return
        if hook in HOOKS_OF_VALIDATION:
            pl_module.abandon_validation()
        elif not self._between_steps(trainer, callback):
            return
        elif hook == "on_train_batch_end":
            pl_module.validation_is_due = _validation_follows(trainer)
        with torch.inference_mode(mode=False), torch.no_grad():
            self._save(trainer, pl_module)

    def _between_steps(self, trainer: Trainer, callback: lightning.Callback) -> bool:
        """Whether the step is complete and all callbacks of this project before the checkpoint have seen it."""
        skipped = trainer.callbacks[trainer.callbacks.index(callback) : trainer.callbacks.index(self)]
        return trainer.fit_loop.epoch_loop._accumulated_batches_reached() and all(map(_is_added, skipped))

    def on_fit_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Verify the final export, also if a resumed run has no steps left."""
        folder = self.run_dir / "hf"
        if run_status(trainer) != "finished":
            return
        if self.saved_step != trainer.global_step:  # a time limit of 0 ends a fit before `on_train_start`
            self._save(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        if not self._has_valid_export():
            log.warning("%s is missing or damaged and is written again.", folder)
            self._export(trainer, pl_module)
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
        return due and step != self.saved_step

    def _save(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Save a checkpoint and the export; collective, rank 0 writes."""
        step, scratch = trainer.global_step, scratch_file(self.run_dir, trainer.global_step)
        name = checkpoint_file(self.run_dir, step)
        with (
            outside_training_time(trainer, SAVE),
            input_error_when_full(f"the checkpoint of step {step}, {name}", lambda: recovery_hint(self.run_dir)),
        ):
            checkpoint_folder(self.run_dir).mkdir(parents=True, exist_ok=True)
            if trainer.is_global_zero:
                delete_checkpoint(scratch)
            try:
                trainer.save_checkpoint(scratch, weights_only=False)
                with input_error_when_full(f"the export {self.run_dir / 'hf'}", lambda: recovery_hint(self.run_dir)):
                    self._export(trainer, pl_module)
                if trainer.is_global_zero:
                    commit_checkpoint(self.run_dir, step, self.keep_last)
            finally:
                if trainer.is_global_zero:
                    delete_checkpoint(scratch)
            trainer.strategy.barrier("checkpoint recorded")
        self.saved_step = step

    def _export(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        with outside_training_time(trainer, EXPORT):
            self._write_export(trainer, pl_module)

    def _write_export(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        model = pl_module.export_on_first_rank()
        if model is not None:
            scores = {n: f"{float(v):.4f}" for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
            card = {
                "title": self.run_dir.name,
                "parameters": f"{model.num_parameters():,}",
                "steps": str(trainer.global_step),
                "target tokens trained on": f"{pl_module.tokens_seen:,}",
                **scores,
                "trained with": "gpt2-lab",
            }
            write_hf_folder(model, pl_module.tokenizer, self.run_dir / "hf", card, pl_module.export_adapter)
        elif pl_module.is_sharded:
            # Gathering the adapter is collective
            with tempfile.TemporaryDirectory(prefix=".adapter-", dir=self.run_dir) as unused:
                pl_module.export_adapter(Path(unused))


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
            torch.save(checkpoint, file)

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


def _raising_callback(error: BaseException) -> tuple[Any, str]:
    """Return the callback that raised the error in a hook after a step, and the hook; otherwise (None, "")."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        values = frame.f_locals
        if frame.f_code is call._call_callback_hooks.__code__:
            if values["hook_name"] in (*HOOKS_OF_VALIDATION, *HOOKS_AFTER_A_STEP):
                return values["callback"], values["hook_name"]
            return None, ""
    return None, ""


def _is_added(callback: lightning.Callback | None) -> bool:
    return callback is not None and type(callback).__module__.partition(".")[0] not in ("callbacks", "launch")
