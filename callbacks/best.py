"""Best: the validation with the best watched metric so far, and early stopping when it gets no better.

Its state is part of every checkpoint, so a resumed run compares with the same validation as an unbroken one.
"""

import logging
import math
from dataclasses import replace
from typing import Any

import lightning
from lightning import Trainer

from gpt2lab.evaluation.document_losses import write_document_losses
from gpt2lab.metric_names import MEASURED_BY_VALIDATION, VAL_LOSS, is_better
from gpt2lab.reports.run_texts import write_examples

log = logging.getLogger(__name__)


class Best(lightning.Callback):
    """Remember the best validation, and stop after `patience` validations without a better one.

    Placed before Checkpoint, which saves this state and exports the best weights.

    Args:
        patience: validations without improvement after which the run is stopped; 0: it is not.
        exports_best: whether `hf/` holds the weights of the best validation, not the last ones.
        data_hash: hash of the data, stored with the losses by document.

    Attributes:
        step: optimizer step of the best validation; None before the first one with a finite value.
        metrics: metrics of that validation.
        errors: standard errors of scores of generated text, at the validation of the exported weights.
        validations_since: number of validations after it.
        has_stopped: whether the run was stopped for lack of improvement.
    """

    def __init__(self, patience: int = 0, exports_best: bool = False, data_hash: str = "") -> None:
        self.patience = patience
        self.exports_best = exports_best
        self.data_hash = data_hash
        self.step: int | None = None
        self.metrics: dict[str, float] = {}
        self.errors: dict[str, float] = {}
        self.validations_since = 0
        self.validated_step = -1
        self.has_stopped = False

    def state_dict(self) -> dict[str, Any]:
        counts = {"validations_since": self.validations_since, "validated_step": self.validated_step}
        return {"step": self.step, "metrics": self.metrics, "errors": self.errors, **counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.metrics = state_dict["step"], state_dict["metrics"]
        self.errors = state_dict.get("errors", {})  # older checkpoints have none
        self.validations_since, self.validated_step = state_dict["validations_since"], state_dict["validated_step"]

    def forget(self) -> None:
        """Start again without a best validation; the weights of the known one are lost."""
        self.step, self.metrics, self.errors, self.validations_since = None, {}, {}, 0

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self._stop_without_improvement(trainer)  # a run that was stopped early is resumed with the same patience

    def on_validation_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        watched = str(pl_module.watched_metric)
        latest = trainer.callback_metrics.items()
        measured = {name: float(value) for name, value in latest if name.startswith(MEASURED_BY_VALIDATION)}
        values = tuple(measured.get(name, math.nan) for name in (watched, VAL_LOSS))
        if self._is_better(watched, *trainer.strategy.broadcast(values, src=0)):  # all ranks must stop together
            self.step, self.metrics, self.validations_since = trainer.global_step, measured, 0
        elif self.validated_step != trainer.global_step:  # else repeated after a failure within the validation
            self.validations_since += 1
        self.validated_step = trainer.global_step
        if not self.exports_best or self.step in (None, trainer.global_step):
            self._write_validation(trainer, pl_module)
        self._stop_without_improvement(trainer)

    def _is_better(self, watched: str, value: float, loss: float) -> bool:
        """Whether a validation is better than the best one; between equal scores of text the loss decides."""
        known = self.metrics.get(watched)
        return is_better(watched, value, known) or (
            value == known and is_better(VAL_LOSS, loss, self.metrics[VAL_LOSS])
        )

    def value_so_far(self, watched: str, value: float) -> float:
        """Return the value by which a search ranks the run now: the best one if that is exported."""
        known = self.metrics.get(watched)
        return value if not self.exports_best or known is None or is_better(watched, value, known) else known

    def exported_metrics(self, trainer: Trainer) -> dict[str, float]:
        """Return the metrics of the last step; those of validation are of the weights in `hf/`."""
        latest = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return {**latest, **self.metrics} if self.exports_best else latest

    def _write_validation(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        losses, self.errors = pl_module.validation_documents, pl_module.validation_errors
        if trainer.is_global_zero and losses is not None:
            write_document_losses(trainer.default_root_dir, replace(losses, data=self.data_hash))
        if trainer.is_global_zero and pl_module.validation_examples:
            write_examples(trainer.default_root_dir, pl_module.validation_examples)

    def _stop_without_improvement(self, trainer: Trainer) -> None:
        is_over = self.patience and self.validations_since >= self.patience
        if is_over and not trainer.should_stop and trainer.global_step < trainer.max_steps:
            log.info(
                "Stopped early after step %d: the last %d validations were no better than that of step %s.",
                trainer.global_step,
                self.validations_since,
                self.step,
            )
            self.has_stopped = trainer.should_stop = True


def find_best(trainer: Trainer) -> Best:
    """Return the run's Best; one without a validation where the Trainer has none."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, Best)), Best())
