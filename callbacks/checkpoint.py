"""Checkpoint: saves between optimizer steps what a run needs to continue, and beside it a Hugging Face folder."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from transformers import GPT2LMHeadModel

from callbacks.ending import is_pruned, status_of
from callbacks.loggers.protocols import TakesModels
from callbacks.throughput import outside_training_time
from gpt2lab.data.batch import Batch
from gpt2lab.errors import InputError
from gpt2lab.reports.hf_folder import verify_in_fresh_process, write_hf_folder
from gpt2lab.storage.atomic_files import told_when_full
from gpt2lab.storage.checkpoint_ledger import (
    checkpoint_file,
    checkpoint_folder,
    discard,
    drop_after,
    record,
    scratch_file,
    what_is_kept,
)
from gpt2lab.storage.metrics_csv import drop_metrics_after
from gpt2lab.storage.model_folder import folder_of
from gpt2lab.storage.sharded_checkpoint import is_sharded, read_whole
from gpt2lab.storage.tensor_file import read_checkpoint_file

log = logging.getLogger(__name__)


class Checkpoint(lightning.Callback):
    """Saves every `checkpoint_every` steps and the last state of a fit, whatever ends it; one of the last callbacks.

    A step that is also validated is saved after its validation; a run that is being stopped saves before it too. A run
    that a search prunes is not saved for its end. The Hugging Face folder `<run_dir>/hf` is written before the
    checkpoint is put into the ledger, so it is never the older of the two.

    Args:
        keep_last: how many checkpoints stay.
        verify_export: after the last save, load the folder in a fresh process and compare logits.
    """

    def __init__(self, run_dir: str, checkpoint_every: int, keep_last: int = 2, verify_export: bool = True) -> None:
        self.run_dir = Path(run_dir)
        self.checkpoint_every = checkpoint_every
        self.keep_last = keep_last
        self.verify_export = verify_export
        self.saved_step = -1
        self.has_ended = False

    def setup(self, trainer: Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = StreamingCheckpointIO()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.saved_step = checkpoint["global_step"]

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        if pl_module.validation_is_due:
            self.saved_step = -1  # the validation made now changes what a checkpoint holds of its step
        if trainer.is_global_zero:
            drop_after(self.run_dir, trainer.global_step)
            drop_metrics_after(self.run_dir, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        is_stopped = trainer.should_stop and trainer.global_step < trainer.max_steps  # whoever wants that may not wait
        if between_steps and self._is_due(trainer) and (is_stopped or not _validation_follows(trainer)):
            self._save(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        # What was saved to be on the safe side knows nothing of this validation, which some tasks go by.
        if self._is_due(trainer) or trainer.should_stop:
            with torch.inference_mode(mode=False), torch.no_grad():  # validation runs in inference mode
                self._save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Save what ended without being due: by early stopping, a time limit, or a callback after this one."""
        if self.saved_step != trainer.global_step and not is_pruned(trainer):
            self._save(trainer, pl_module)
        self.has_ended = True

    def on_fit_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Verify the last export; also where a resumed run has nothing left to train."""
        folder = self.run_dir / "hf"
        if status_of(trainer) != "finished":
            return
        if self.saved_step != trainer.global_step:  # a time limit of 0 ends a fit before `on_train_start`
            self._save(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        if not self._has_whole_export():
            log.warning("%s is missing or damaged and is written again.", folder)
            self._export(trainer, pl_module)
        if self.verify_export:
            model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
            length = min(model.config.n_positions, 64)
            ids = torch.arange(2 * length).view(2, length) * 7919 % model.config.vocab_size  # (2, T) any fixed ids
            with torch.no_grad():
                difference = verify_in_fresh_process(folder, ids, model(ids).logits)
            log.info("%s loads with transformers alone; largest difference of logits %.1e", folder, difference)
        for logger in trainer.loggers:
            if isinstance(logger, TakesModels):
                logger.log_model(folder)

    def _has_whole_export(self) -> bool:
        try:
            return folder_of(str(self.run_dir / "hf"), "init") == (self.run_dir / "hf").resolve()
        except InputError:
            return False

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        due = step % self.checkpoint_every == 0 or step == trainer.max_steps or trainer.should_stop
        return due and step != self.saved_step

    def _save(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Every rank takes part, rank 0 writes."""
        step, scratch = trainer.global_step, scratch_file(self.run_dir, trainer.global_step)
        name = checkpoint_file(self.run_dir, step)
        with (
            outside_training_time(trainer),
            told_when_full(f"the checkpoint of step {step}, {name}", lambda: what_is_kept(self.run_dir)),
        ):
            checkpoint_folder(self.run_dir).mkdir(parents=True, exist_ok=True)
            if trainer.is_global_zero:
                discard(scratch)
            try:
                trainer.save_checkpoint(scratch, weights_only=False)
                with told_when_full(f"the export {self.run_dir / 'hf'}", lambda: what_is_kept(self.run_dir)):
                    self._export(trainer, pl_module)
                if trainer.is_global_zero:
                    record(self.run_dir, step, self.keep_last)
            finally:
                if trainer.is_global_zero:
                    discard(scratch)
            trainer.strategy.barrier("checkpoint recorded")
        self.saved_step = step

    def _export(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
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
            with tempfile.TemporaryDirectory(
                prefix=".adapter-", dir=self.run_dir
            ) as unused:  # gathering the adapter takes all ranks
                pl_module.export_adapter(Path(unused))


class StreamingCheckpointIO(TorchCheckpointIO):
    """Writes straight to the file; Lightning's own first builds the whole file in memory. Reads shards as one file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        with Path(path).open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *arguments: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return read_whole(Path(path)) if is_sharded(Path(path)) else read_checkpoint_file(Path(path))


def is_complete(trainer: Trainer) -> bool:
    """Whether training is over and its last state is saved: what fails from here on leaves the run complete."""
    if is_pruned(trainer):
        return True
    step = trainer.global_step
    return any(
        callback.saved_step == step and (callback.has_ended or trainer.should_stop or step >= trainer.max_steps)
        for callback in trainer.callbacks
        if isinstance(callback, Checkpoint)
    )


def _validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning is about to validate after this step; it decides by interval and by `should_stop`."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
