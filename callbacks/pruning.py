"""Pruning: report the watched metric to a search's Optuna study after each validation, and stop pruned trials.

Under export=best it reports the best value so far, by which the trial is ranked in the end.

Rank 0 accesses the study and broadcasts the decision. If the study cannot be read or written, a warning is logged once
and the job continues without pruning.
"""

import logging
from pathlib import Path
from typing import Any

import lightning
from lightning import Trainer

from callbacks.best import find_best
from gpt2lab.analysis.optuna_storage import load_study
from gpt2lab.errors import InputError

log = logging.getLogger(__name__)


class TrialReports(lightning.Callback):
    """Report to the study. Placed first, so that every validated step in a checkpoint is in the study, too.

    Args:
        study_file: the study's database.
        number: number of this run's trial.
    """

    def __init__(self, study_file: Path, number: int) -> None:
        self.study_file = study_file
        self.number = number
        self._trial: Any = None
        self._reported: set[int] = set()

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        import optuna

        try:
            study = load_study(self.study_file)
            if study is None:
                log.warning("There is no study in %s: this run is not pruned.", self.study_file)
                return
            known = study.get_trials(deepcopy=False)[self.number]
            self._trial = optuna.trial.Trial(study, known._trial_id)
            self._reported = set(known.intermediate_values)  # by this run, before it was resumed
        except (InputError, optuna.exceptions.StorageInternalError) as error:
            self._disable(error)

    def on_validation_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        watched, step = str(pl_module.watched_metric), trainer.global_step
        is_new = step not in self._reported and watched in trainer.callback_metrics
        if self._trial is None or not is_new:
            return
        import optuna

        try:
            value = find_best(trainer).value_so_far(watched, float(trainer.callback_metrics[watched]))
            self._trial.report(value, step)
            self._reported.add(step)
        except optuna.exceptions.StorageInternalError as error:
            self._disable(error)

    def should_prune(self) -> bool:
        """Whether the study prunes this trial; only on rank 0."""
        if self._trial is None or not self._reported:
            return False
        import optuna

        try:
            return bool(self._trial.should_prune())
        except optuna.exceptions.StorageInternalError as error:
            self._disable(error)
            return False

    def _disable(self, error: Exception) -> None:
        log.warning("The study %s cannot be used, this run is not pruned: %s", self.study_file, error)
        self._trial = None


class Pruning(lightning.Callback):
    """Stop a pruned run and set `is_pruned`. Placed last, after all other callbacks of the step."""

    def __init__(self, reports: TrialReports) -> None:
        self.reports = reports
        self.is_pruned = False

    def on_validation_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        should_prune = trainer.strategy.broadcast(self.reports.should_prune(), src=0)
        if should_prune and not trainer.should_stop:  # otherwise the run stops at this step for another reason
            log.info("Pruned after step %d: other trials were better at this step.", trainer.global_step)
            self.is_pruned = trainer.should_stop = True
