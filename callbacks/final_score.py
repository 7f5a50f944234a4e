"""FinalScore: score the exported weights once after training, on a larger part of the validation split."""

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning import Trainer
from lightning.fabric.utilities import move_data_to_device
from numpy.typing import NDArray
from torch import Tensor

from callbacks.best import find_best
from callbacks.ending import run_status
from callbacks.loggers.protocols import TakesScores
from callbacks.progress_marks import ProgressMarks
from callbacks.report import Report
from callbacks.throughput import VALIDATE, outside_training_time
from gpt2lab import metric_names
from gpt2lab.data.document_groups import DOCUMENT_NATS, DOCUMENT_TARGETS
from gpt2lab.evaluation.document_losses import DocumentLosses, read_document_losses
from gpt2lab.model.backbone import Backbone, load_backbone
from gpt2lab.reports.model_card import read_step
from gpt2lab.settings import MOST_SCORED
from gpt2lab.storage.metrics_csv import read_metrics, series
from gpt2lab.storage.report_json import FINAL_SCORE, read_report
from gpt2lab.system.device import widest_float
from gpt2lab.system.terminal import Phase

LOSS, ERROR, TOKENS = FINAL_SCORE


class FinalScore(lightning.Callback):
    """Add the loss of what `hf/` holds to the report of a complete run; placed between Checkpoint and Report.

    The report is written without it first, so a run that is killed meanwhile is complete and only lacks its score,
    which `resume=` computes.

    Args:
        tokens: most tokens that are scored; "auto": those that the launcher sets by the length of the run.
    """

    def __init__(self, tokens: int | str = "auto") -> None:
        self.is_auto = tokens == "auto"
        self.tokens = MOST_SCORED if self.is_auto else int(tokens)
        self._stored: dict[str, Any] = {}
        self._rows: NDArray[np.int64] | None = None

    def setup(self, trainer: Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._stored = read_report(trainer.default_root_dir)

    def rows(self, trainer: Trainer) -> NDArray[np.int64]:
        """Return the rows of the validation split that are scored."""
        if self._rows is None:
            self._rows = trainer.datamodule.validation_rows(self.tokens)
        return self._rows

    def on_fit_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        reports = [callback for callback in trainer.callbacks if isinstance(callback, Report)]
        if not reports or run_status(trainer) in ("stopped", "pruned") or trainer.fast_dev_run:
            return
        has_export = (Path(trainer.default_root_dir) / "hf").is_dir()  # on the first rank, which may have repaired it
        if not trainer.strategy.broadcast(has_export):
            return  # without the callback Checkpoint nothing is exported
        rows = self.rows(trainer)
        known = self._known(trainer, rows) if trainer.is_global_zero else {}
        score = trainer.strategy.broadcast(known)
        if not score:
            reports[0].write(trainer, pl_module, run_status(trainer))
            loader = trainer.datamodule.scoring_dataloader(rows)
            with outside_training_time(trainer, VALIDATE, "final score", len(loader)) as phase:
                score = self._score(trainer, pl_module, loader, phase)
        reports[0].score = score
        values = {name: value for name, value in score.items() if value is not None}
        for logger in trainer.loggers:
            if isinstance(logger, TakesScores):
                logger.log_score(values, trainer.global_step)

    def _known(self, trainer: Trainer, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Return the score that is known already: of an earlier end of the run, or of a validation of these rows."""
        data, limit = trainer.datamodule, trainer.limit_val_batches
        reads_all = isinstance(limit, float) and limit == 1.0
        validates_them = len(rows) <= len(data.val_rows) and reads_all  # both are prefixes of one order
        tokens = int(data.val_samples.target_counts(data.val_rows if validates_them else rows).sum())
        scored = tuple(self._stored.get(name) for name in ("steps", "best_step", TOKENS))
        if scored == (trainer.global_step, find_best(trainer).step, tokens):
            return {name: self._stored.get(name) for name in (LOSS, ERROR, TOKENS)}
        if not validates_them:
            return {}
        step = read_step(Path(trainer.default_root_dir) / "hf")
        losses = dict(series(read_metrics(trainer.default_root_dir), metric_names.VAL_LOSS))
        documents = read_document_losses(trainer.default_root_dir)
        error = documents.standard_error if documents is not None else None
        return {LOSS: losses[step], ERROR: error, TOKENS: tokens} if step in losses else {}

    def _score(
        self, trainer: Trainer, pl_module: lightning.LightningModule, loader: Any, phase: Phase
    ) -> dict[str, Any]:
        """Score the batches, distributed over the ranks, in the precision of a validation."""
        device, backbone = trainer.strategy.root_device, self._exported(trainer, pl_module)
        sums: dict[str, Tensor] = {"targets": torch.zeros((), dtype=widest_float(device), device=device)}
        marks = [callback.heartbeat for callback in trainer.callbacks if isinstance(callback, ProgressMarks)]
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            for number, batch in enumerate(loader, 1):
                for heartbeat in marks:
                    heartbeat.mark(f"scoring the exported weights, in batch {number}")
                batch = move_data_to_device(batch, device)
                found = pl_module.cross_entropy_sums(backbone, batch)
                for name, value in {**found, "targets": torch.tensor(float(batch.target_tokens))}.items():
                    sums[name] = sums.get(name, 0) + value.to(device, widest_float(device))
                phase.advance()
        whole = {name: pl_module.over_ranks(value) for name, value in sums.items()}
        error = None
        if DOCUMENT_NATS in whole:
            error = DocumentLosses.of(whole[DOCUMENT_NATS].cpu(), whole[DOCUMENT_TARGETS].cpu()).standard_error
        loss, targets = whole[metric_names.VAL_LOSS].item(), whole["targets"].item()
        return {LOSS: loss / targets, ERROR: error, TOKENS: round(targets)}

    def _exported(self, trainer: Trainer, pl_module: lightning.LightningModule) -> Backbone:
        """Return what `hf/` holds, on the device, or split over the ranks as the trained model is."""
        backbone = load_backbone(str(Path(trainer.default_root_dir) / "hf")).eval().requires_grad_(False)
        backbone = trainer.precision_plugin.convert_module(backbone)
        if not pl_module.is_sharded:
            return backbone.to(trainer.strategy.root_device)
        trainer.strategy.shard(backbone, backbone.blocks)
        return backbone
