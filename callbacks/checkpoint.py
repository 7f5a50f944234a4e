"""Checkpoint: saves between optimizer steps what a run needs to go on, and beside it a Hugging Face folder."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from transformers import GPT2LMHeadModel

from callbacks.logger_kinds import TakesModels
from callbacks.throughput import outside_training_time
from gpt2lab.atomic_files import told_when_full
from gpt2lab.batch import Batch
from gpt2lab.checkpoint_ledger import (
    checkpoint_folder,
    discard,
    drop_after,
    newest_good_checkpoint,
    record,
    scratch_file,
)
from gpt2lab.hf_folder import verify_in_fresh_process, write_hf_folder
from gpt2lab.metrics_file import drop_metrics_after
from gpt2lab.sharded_checkpoint import is_sharded, read_whole

log = logging.getLogger(__name__)


class Checkpoint(lightning.Callback):
    """Saves every `checkpoint_every` steps, after the last step and when the run is stopped; one of the last callbacks.

    A step that is also validated is saved after its validation; a run that is being stopped saves before it too. The
    Hugging Face folder `<run_dir>/hf` is written before the checkpoint is put into the ledger, so it is never the older
    of the two.

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

    def setup(self, trainer: Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = StreamingCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        # A validation that is made up for changes what a checkpoint keeps, so its step is saved again.
        self.saved_step = -1 if pl_module.validation_is_due else trainer.global_step
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

    def save_if_due(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Save where the run is stopped in a validation; every rank must call it."""
        if self._is_due(trainer):
            self._save(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """The last export is proven; also where a run taken up again had nothing left to train."""
        folder = self.run_dir / "hf"
        is_over = trainer.global_step >= trainer.max_steps and not pl_module.validation_is_due
        if not trainer.is_global_zero or not is_over or not folder.exists():
            return
        if self.verify_export:
            model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
            length = min(model.config.n_positions, 64)
            ids = torch.arange(2 * length).view(2, length) * 7919 % model.config.vocab_size  # (2, T) any fixed ids
            with torch.no_grad():
                difference = verify_in_fresh_process(folder, ids, model(ids).logits)
            log.info("%s loads with transformers alone; largest difference of logits %.1e", folder, difference)
        for logger in trainer.loggers:
            if isinstance(logger, TakesModels):
                logger.log_model(folder)

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        due = step % self.checkpoint_every == 0 or step == trainer.max_steps or trainer.should_stop
        return due and step != self.saved_step

    def _save(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        """Every rank takes part, rank 0 writes."""
        step = trainer.global_step
        older = newest_good_checkpoint(self.run_dir) if trainer.is_global_zero else None
        kept = f"{older} is intact: free some space and continue with resume={self.run_dir}" if older else ""
        with (
            outside_training_time(trainer),
            told_when_full(f"the checkpoint of step {step}", kept or "Free some space."),
        ):
            checkpoint_folder(self.run_dir).mkdir(parents=True, exist_ok=True)
            scratch = scratch_file(self.run_dir, step)
            if trainer.is_global_zero:
                discard(scratch)
            try:
                trainer.save_checkpoint(scratch, weights_only=False)
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
            with tempfile.TemporaryDirectory() as unused:  # gathering the adapter takes all ranks
                pl_module.export_adapter(Path(unused))


class StreamingCheckpointIO(TorchCheckpointIO):
    """Writes straight to the file; Lightning's own first builds the whole file in memory. Reads shards as one file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        with Path(path).open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *arguments: Any, weights_only: bool | None = None) -> dict[str, Any]:
        if is_sharded(Path(path)):
            return read_whole(Path(path))
        return super().load_checkpoint(path, *arguments, weights_only=weights_only)


def _validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning is about to validate after this step; it decides by interval and by `should_stop`."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
