"""Optuna search: a job source that samples overrides with Optuna, given the results of earlier jobs.

The study file is in the sweep's folder, and trial numbers are job numbers. Only the process that starts the jobs
samples values, so all ranks of a job receive the same. A resumed search records the ended trials again and continues
the running ones from their checkpoints.
"""

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from gpt2lab import metric_names
from gpt2lab.analysis.optuna_storage import STUDY_FILE, input_error_when_unusable, load_study, make_study
from gpt2lab.errors import InputError
from launch import exit_codes
from launch.checks import checks
from launch.config import schema
from launch.config.schema import RunConfig
from launch.config.unused_keys import deciding_groups, given_keys, unread_keys, without
from launch.logging_setup import announce
from launch.sweep import search_space
from launch.sweep.grid import CHANGEABLE_ON_RESUME, run_sweep
from launch.sweep.job_queue import Proposal
from launch.sweep.jobs import Job
from launch.sweep.search_space import Dimension

GROUP = "hparams_search"
ERROR, CHOSEN = "error", "chosen"  # user attributes of a trial
ATTEMPTS = 50  # samples until a new combination is found
UNTYPED_GROUPS = ("task", "data", "callbacks", "logger")  # groups whose choices have different keys


def run_search(loader: ConfigLoader, sweep_config: DictConfig, arguments: Sequence[str]) -> None:
    """Run a hyperparameter search.

    Raises:
        InputError: the search space or the settings are invalid, or the folder contains another search.
        exit_codes.Exit: a signal stopped the search, or jobs failed.
    """
    announce("Checking the search space")
    search = Search(loader, sweep_config, arguments)
    with input_error_when_unusable(search.file):
        run_sweep(loader, sweep_config, search, search.example_jobs(), searched=search.keys)


class Search:
    """A source of at most `n_trials` jobs, with different values each.

    Args:
        loader, sweep_config: compose the configuration of a job.
        arguments: overrides as typed; those in Hydra's sweep syntax are the search space.

    Raises:
        InputError: the search space or the settings are invalid, or the folder contains another search.
    """

    def __init__(self, loader: ConfigLoader, sweep_config: DictConfig, arguments: Sequence[str]) -> None:
        self._loader = loader
        self._sweep_config = sweep_config
        given = [argument for argument in arguments if given_keys([argument])[0].split(".")[0] != GROUP]
        self._fixed, self._dimensions = search_space.parse(given, loader)
        if not self._dimensions:
            raise InputError(
                "hparams_search=optuna has nothing to search: every key has one value.\n"
                "Give a range, 'optimizer.lr=interval(1e-4,1e-2)', or choices, model=nano,micro."
            )
        config = schema.from_composed(sweep_config.copy())
        checks.check_values(config)
        self.settings = config.hparams_search
        self._validate_every = config.validate_every
        for dimension in self._dimensions:
            self._check_used(dimension)
        self._metric = self._watched_metric()
        self._command = sorted(without(arguments, (*CHANGEABLE_ON_RESUME, f"{GROUP}.n_trials")))
        self.file = Path(str(sweep_config.hydra.sweep.dir)) / STUDY_FILE
        self._study = load_study(self.file)
        self._earlier: list[FrozenTrial] = []
        if self._study is not None:
            self._check_resumed(self._study, "resume=auto" in arguments)
            trials = self._study.get_trials(deepcopy=False)
            self._study.sampler = self._sampler(len(trials))
            self._earlier = [trial for trial in trials if trial.user_attrs or trial.state == TrialState.RUNNING]
        self._proposed = [trial.user_attrs.get(CHOSEN, []) for trial in self._earlier]
        self._used: dict[tuple[str, tuple[str, ...]], bool] = {}  # cache: composing a configuration is slow
        self._random = RandomSampler(self.settings.seed)
        self._open: dict[int, Trial] = {}  # trials whose jobs have not ended

    # Source of jobs

    def ask(self) -> Proposal | None:
        """Return the trials of an interrupted search first, then new ones."""
        study = self._study = self._study or self._new_study()
        if self._earlier:
            known = self._earlier.pop(0)
            if known.state != TrialState.RUNNING:
                overrides = [*self._fixed, *known.user_attrs[CHOSEN]]
                return Proposal(overrides, known.number, known.user_attrs.get(ERROR, ""))
            trial = Trial(study, known._trial_id)
            chosen = known.user_attrs.get(CHOSEN) or self._chosen(trial)
        else:
            new = self._new_trial(study) if len(self._proposed) < self.settings.n_trials else None
            if new is None:
                return None
            trial, chosen = new
            self._proposed.append(chosen)
        trial.set_user_attr(CHOSEN, chosen)
        self._open[trial.number] = trial
        return Proposal([*self._fixed, *chosen], trial.number)

    def tell(self, job: Job) -> None:
        """Store the result in the study; the trial of a stopped job stays open, since a resumed search continues it."""
        trial = self._open.get(job.number)
        if trial is None or job.status == "stopped":
            return
        assert self._study is not None
        del self._open[job.number]
        if job.status == "pruned":
            self._study.tell(trial, state=TrialState.PRUNED)
        elif job.status == "finished" and job.watched is not None and math.isfinite(job.watched):
            self._study.tell(trial, job.watched)
        else:
            trial.set_user_attr(ERROR, job.error or f"the run has no finite value of {self._metric}")
            self._study.tell(trial, state=TrialState.FAIL)

    def _new_trial(self, study: Study) -> tuple[Trial, list[str]] | None:
        """Sample a combination that was not proposed before: (trial, overrides), or None after `ATTEMPTS` duplicates.

        A duplicate would repeat a run, so its trial is closed as failed, and the next attempt samples at random.
        """
        sampler = study.sampler
        try:
            for _ in range(ATTEMPTS):
                trial = study.ask()
                chosen = self._chosen(trial)
                if chosen not in self._proposed:
                    return trial, chosen
                study.tell(trial, state=TrialState.FAIL)
                study.sampler = self._random
        finally:
            study.sampler = sampler
        return None

    def _chosen(self, trial: Trial) -> list[str]:
        """Sampled overrides; keys that the job does not read are not sampled."""
        chosen: dict[str, str] = {}
        for dimension in self._dimensions:
            deciding = tuple(chosen[other.key] for other in self._deciders(dimension) if other.key in chosen)
            if not deciding or self._is_used(dimension, deciding):
                chosen[dimension.key] = dimension.suggest(trial)
        return list(chosen.values())

    # Keys that a job has and reads

    def _deciders(self, dimension: Dimension) -> list[Dimension]:
        """Earlier dimensions whose values decide whether this one is used."""
        key = dimension.key
        heads = deciding_groups(key) | ({key.split(".")[0]} & set(UNTYPED_GROUPS))
        if heads and key != "task":
            heads |= {"task", "experiment"}
        before = self._dimensions[: self._dimensions.index(dimension)]
        return [other for other in before if other.key.split(".")[0] in heads]

    def _is_used(self, dimension: Dimension, deciding: tuple[str, ...]) -> bool:
        if (dimension.key, deciding) not in self._used:
            self._used[dimension.key, deciding] = self._why_unused(dimension, deciding) is None
        return self._used[dimension.key, deciding]

    def _why_unused(self, dimension: Dimension, deciding: Sequence[str]) -> InputError | None:
        """Return the error if a job with these choices does not have or does not read the key; else None."""
        config = self._composed([*deciding, dimension.examples[0]])
        if isinstance(config, InputError):
            return config
        unread = unread_keys(config).get(dimension.key)
        return InputError(f"{unread}.\nLeave it out.") if unread else None

    def _check_used(self, dimension: Dimension) -> None:
        """Check that at least one choice of the groups that the key depends on has it and reads it.

        Raises:
            InputError: no choice does; the message is that of the first.
        """
        errors = []
        for chosen in _combinations(self._deciders(dimension)):
            error = self._why_unused(dimension, chosen)
            if error is None:
                return
            errors.append(str(error))
        hint = "\nSearch whole numbers with range(low,high)." if "is not a whole number" in errors[0] else ""
        raise InputError(f"{errors[0]}{hint}")

    def _watched_metric(self) -> str:
        """The metric that the search optimizes.

        Raises:
            InputError: the jobs watch different metrics.
        """
        decide = [d for d in self._dimensions if d.key in ("task", "experiment", "data")]
        composed = map(self._composed, _combinations(decide))
        metrics = {config.watched_metric for config in composed if isinstance(config, RunConfig)}
        if len(metrics) > 1:
            raise InputError(
                f"The jobs of this search watch different metrics, {' and '.join(sorted(metrics))}, "
                "which cannot be compared.\nSearch them one after the other."
            )
        return metrics.pop() if metrics else metric_names.VAL_LOSS

    @property
    def total(self) -> int:
        """Number of trials at most."""
        return self.settings.n_trials

    @property
    def keys(self) -> list[str]:
        """Searched keys."""
        return [dimension.key for dimension in self._dimensions]

    def example_jobs(self) -> list[list[str]]:
        """Overrides of example jobs: each choice of task and experiment, with one value of all other keys."""
        decide = [d for d in self._dimensions if d.key in ("task", "experiment")]
        rest = [d.examples[0] for d in self._dimensions if d not in decide]
        return [[*self._fixed, *chosen, *rest] for chosen in _combinations(decide)]

    def _composed(self, chosen: list[str]) -> RunConfig | InputError:
        """Return the configuration of a job with these choices; the error if there is no such job."""
        try:
            return schema.from_composed(self._loader.load_sweep_config(self._sweep_config, [*self._fixed, *chosen]))
        except Exception as error:
            input_error = exit_codes.as_input_error(error)
            if input_error is None:
                raise
            return input_error

    # The study

    def _new_study(self) -> Study:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        settings = self.settings
        pruner = {
            "name": settings.pruner,
            "n_startup_trials": settings.n_startup_trials,
            "warmup_steps": settings.warmup_steps,
            "validate_every": self._validate_every,
        }
        notes: dict[str, Any] = {"metric": self._metric, "asked_for": self._command, "pruner": pruner}
        return make_study(self.file, metric_names.lower_is_better(self._metric), self._sampler(0), notes)

    def _sampler(self, known: int) -> BaseSampler:
        """Create the sampler; the number of known trials offsets its seed, so a resumed search does not repeat them."""
        seed = None if self.settings.seed is None else self.settings.seed + known
        if self.settings.sampler == "random":
            return RandomSampler(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            # group: models keys jointly that occur together, also if other trials have other keys
            return TPESampler(n_startup_trials=self.settings.n_startup_trials, seed=seed, group=True)

    def _check_resumed(self, study: Study, resumes: bool) -> None:
        """Check that the study in the folder belongs to this command.

        Raises:
            InputError: it does not, or resume=auto is missing.
        """
        folder = self.file.parent
        if not resumes:
            raise InputError(
                f"{folder} contains a search already.\n"
                "Resume it with the same command and resume=auto, or give another hydra.sweep.dir."
            )
        before, now = set(study.user_attrs["asked_for"]), set(self._command)
        if before != now:
            raise InputError(
                f"{folder} contains another search: it was started with {_join(before - now)}, this command has "
                f"{_join(now - before)}.\nGive the same command as before, or another hydra.sweep.dir."
            )
        stored = [one for trial in study.get_trials(deepcopy=False) for one in trial.user_attrs.get(CHOSEN, [])]
        unknown = [one for one in stored if not any(dimension.allows(one) for dimension in self._dimensions)]
        if unknown:  # from an untrusted folder, whose overrides would gain the permissions of this command line
            raise InputError(
                f"{self.file} has a trial with {unknown[0]}, which this command does not search.\n"
                "Give the same command as before, or another hydra.sweep.dir."
            )


def _combinations(dimensions: list[Dimension]) -> Iterator[list[str]]:
    for chosen in itertools.product(*(dimension.examples for dimension in dimensions)):
        yield list(chosen)


def _join(arguments: set[str]) -> str:
    return " ".join(sorted(arguments)) or "nothing more"
