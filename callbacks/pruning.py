"""Pruning: tells a search's study how a job is doing after each validation, and ends the job where that is hopeless.

Rank 0 reports the watched metric and asks; all ranks do as it is told. A study that cannot be read or written is told
of once and the job goes on: it is worth more than its pruning.
"""

import logging
from pathlib import Path
from typing import Any

import lightning
from lightning import Trainer

from gpt2lab.analysis.optuna_storage import load_study
from gpt2lab.errors import InputError

log = logging.getLogger(__name__)


class TrialReports(lightning.Callback):
    """Tells the study. Stands first: a step that is in a checkpoint, from which a killed run goes on, is in the study.

    Args:
        study_file: the study's database.
        number: the trial that this run is.
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
            self._reported = set(known.intermediate_values)  # by this run, before it was taken up again
        except (InputError, optuna.exceptions.StorageInternalError) as error:
            self._give_up(error)

    def on_validation_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        watched, step = str(pl_module.watched_metric), trainer.global_step
        is_new = step not in self._reported and watched in trainer.callback_metrics
        if self._trial is None or not is_new:
            return
        import optuna

        try:
            self._trial.report(float(trainer.callback_metrics[watched]), step)
            self._reported.add(step)
        except optuna.exceptions.StorageInternalError as error:
            self._give_up(error)

    def is_hopeless(self) -> bool:
        """Whether the study would end this run; on rank 0 alone."""
        if self._trial is None or not self._reported:
            return False
        import optuna

        try:
            return bool(self._trial.should_prune())
        except optuna.exceptions.StorageInternalError as error:
            self._give_up(error)
            return False

    def _give_up(self, error: Exception) -> None:
        log.warning("The study %s cannot be used, this run is not pruned: %s", self.study_file, error)
        self._trial = None


class Pruning(lightning.Callback):
    """After the run, `is_pruned` says whether it was ended early. Stands last: what is due at a step is done before."""

    def __init__(self, reports: TrialReports) -> None:
        self.reports = reports
        self.is_pruned = False

    def on_validation_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        is_hopeless = trainer.strategy.broadcast(self.reports.is_hopeless(), src=0)
        if is_hopeless and not trainer.should_stop:  # else the run ends with this step for another reason
            log.info("Pruned after step %d: other jobs of this search were better by then.", trainer.global_step)
            self.is_pruned = trainer.should_stop = True
