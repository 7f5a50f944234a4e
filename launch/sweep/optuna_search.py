"""Search: the jobs of a multirun whose values Optuna proposes, each from what became of the earlier ones.

The study lies in the sweep's folder; a trial's number is its job's. Values are asked for here, in the one process that
starts the jobs, so all ranks of a job have the same. A search that was interrupted goes on in its folder: trials that
had ended are listed again, those that were running continue from their checkpoints.
"""

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, open_dict
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from gpt2lab import metric_names
from gpt2lab.analysis.optuna_storage import STUDY_FILE, load_study, make_study, told_when_unusable
from gpt2lab.errors import InputError
from launch import exit_codes
from launch.checks import checks
from launch.config import schema
from launch.config.schema import RunConfig
from launch.config.unused_keys import deciding_groups, given_keys, unread_keys, without
from launch.sweep import search_space
from launch.sweep.grid import HOW, run_sweep
from launch.sweep.job_queue import Proposal
from launch.sweep.jobs import Job
from launch.sweep.search_space import Dimension

OWN = "hparams_search"
ERROR, CHOSEN = "error", "chosen"  # what a trial remembers of its job
ATTEMPTS = 50  # to find values that were not tried
UNTYPED = ("task", "data", "callbacks", "logger")  # groups whose values have different keys


def run_search(loader: ConfigLoader, sweep_config: DictConfig, arguments: Sequence[str]) -> None:
    """Run the search that a command line asks for.

    Raises:
        InputError: a mistake in the space or the settings, or the folder holds another search.
        answer.Ended: a signal stopped the search, or jobs failed.
    """
    search = Search(loader, sweep_config, arguments)
    with told_when_unusable(search.file):
        run_sweep(loader, sweep_config, search, search.foreseen())


class Search:
    """A source of jobs: at most `n_trials` of them, each at other values.

    Args:
        loader, sweep_config: compose a job's configuration.
        arguments: overrides as typed; those in Hydra's sweep syntax are the space.
    """

    def __init__(self, loader: ConfigLoader, sweep_config: DictConfig, arguments: Sequence[str]) -> None:
        self._loader = loader
        self._sweep_config = sweep_config
        given = [argument for argument in arguments if given_keys([argument])[0].split(".")[0] != OWN]
        self._fixed, self._dimensions = search_space.read(given, loader)
        if not self._dimensions:
            raise InputError(
                "hparams_search=optuna has nothing to search: every key has one value.\n"
                "Give a range, 'optimizer.lr=interval(1e-4,1e-2)', or choices, model=nano,micro."
            )
        whole = _typed(sweep_config.copy())
        checks.check_values(whole)
        self.settings = whole.hparams_search
        self._validate_every = whole.validate_every
        for dimension in self._dimensions:
            self._check_used(dimension)
        self._metric = self._watched_metric()
        self._asked_for = sorted(without(arguments, (*HOW, f"{OWN}.n_trials")))
        self.file = Path(str(sweep_config.hydra.sweep.dir)) / STUDY_FILE
        self._study = load_study(self.file)
        self._earlier: list[FrozenTrial] = []
        if self._study is not None:
            self._check_continued(self._study, "resume=auto" in arguments)
            trials = self._study.get_trials(deepcopy=False)
            self._study.sampler = self._sampler(len(trials))
            self._earlier = [trial for trial in trials if trial.user_attrs or trial.state == TrialState.RUNNING]
        self._asked = [trial.user_attrs.get(CHOSEN, []) for trial in self._earlier]
        self._used: dict[tuple[str, tuple[str, ...]], bool] = {}  # composing takes a while
        self._random = RandomSampler(self.settings.seed)
        self._open: dict[int, Trial] = {}  # trials whose jobs have not ended

    # What jobs are asked for and told

    def ask(self) -> Proposal | None:
        """First the trials of an interrupted search, then new ones."""
        study = self._study = self._study or self._new_study()
        if self._earlier:
            known = self._earlier.pop(0)
            if known.state != TrialState.RUNNING:
                overrides = [*self._fixed, *known.user_attrs[CHOSEN]]
                return Proposal(overrides, known.number, known.user_attrs.get(ERROR, ""))
            trial = Trial(study, known._trial_id)
            chosen = known.user_attrs.get(CHOSEN) or self._chosen(trial)
        else:
            new = self._new_trial(study) if len(self._asked) < self.settings.n_trials else None
            if new is None:
                return None
            trial, chosen = new
            self._asked.append(chosen)
        trial.set_user_attr(CHOSEN, chosen)
        self._open[trial.number] = trial
        return Proposal([*self._fixed, *chosen], trial.number)

    def tell(self, job: Job) -> None:
        """A job that was stopped goes on when the search does, so its trial stays open."""
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
            trial.set_user_attr(ERROR, job.error or f"it ended without a value of {self._metric}")
            self._study.tell(trial, state=TrialState.FAIL)

    def _new_trial(self, study: Study) -> tuple[Trial, list[str]] | None:
        """(trial, chosen values) of a job that was not run yet, drawn at random where the sampler repeats itself.

        None: there is hardly one left. A run with the same values would end the same; its trial is closed and
        counts for nothing.
        """
        sampler = study.sampler
        try:
            for _ in range(ATTEMPTS):
                trial = study.ask()
                chosen = self._chosen(trial)
                if chosen not in self._asked:
                    return trial, chosen
                study.tell(trial, state=TrialState.FAIL)
                study.sampler = self._random
        finally:
            study.sampler = sampler
        return None

    def _chosen(self, trial: Trial) -> list[str]:
        """Overrides of what is searched: a key that the job does not read is not sampled."""
        chosen: dict[str, str] = {}
        for dimension in self._dimensions:
            deciding = tuple(chosen[other.key] for other in self._deciders(dimension) if other.key in chosen)
            if not deciding or self._is_used(dimension, deciding):
                chosen[dimension.key] = dimension.suggested(trial)
        return list(chosen.values())

    # Which keys a job has and reads

    def _deciders(self, dimension: Dimension) -> list[Dimension]:
        """The dimensions before this one whose values decide whether it is used."""
        key = dimension.key
        heads = deciding_groups(key) | ({key.split(".")[0]} & set(UNTYPED))
        if heads and key != "task":
            heads |= {"task", "experiment"}
        before = self._dimensions[: self._dimensions.index(dimension)]
        return [other for other in before if other.key.split(".")[0] in heads]

    def _is_used(self, dimension: Dimension, deciding: tuple[str, ...]) -> bool:
        if (dimension.key, deciding) not in self._used:
            try:
                is_used = self._why_unused(dimension, deciding) is None
            except Exception as error:
                if exit_codes.as_mistake(error) is None:
                    raise
                is_used = False  # there is no such key here
            self._used[dimension.key, deciding] = is_used
        return self._used[dimension.key, deciding]

    def _why_unused(self, dimension: Dimension, deciding: Sequence[str]) -> str | None:
        return unread_keys(self._composed([*deciding, dimension.examples[0]])).get(dimension.key)

    def _check_used(self, dimension: Dimension) -> None:
        """Some choice of what the key depends on has it and reads it.

        Raises:
            InputError: says why none does.
        """
        mistake: InputError | None = None
        for chosen in _combinations(self._deciders(dimension)):
            try:
                unused = self._why_unused(dimension, chosen)
            except Exception as error:
                mistake = mistake or exit_codes.as_mistake(error)
                if mistake is None:
                    raise
                continue
            if unused is None:
                return
            mistake = mistake or InputError(f"{unused}.\nLeave it out.")
        assert mistake is not None
        cure = "\nSearch whole numbers with range(low,high)." if "is not a whole number" in str(mistake) else ""
        raise InputError(f"{mistake}{cure}")

    def _watched_metric(self) -> str:
        """What all jobs are judged by.

        Raises:
            InputError: they are judged by different metrics.
        """
        decide = [d for d in self._dimensions if d.key in ("task", "experiment", "data")]
        metrics = set()
        for chosen in _combinations(decide):
            try:
                metrics.add(watched_metric(self._composed(chosen)))
            except Exception as error:
                if exit_codes.as_mistake(error) is None:
                    raise
        if len(metrics) > 1:
            raise InputError(
                f"Some jobs of this search would be judged by {' and others by '.join(sorted(metrics))}, "
                "which cannot be compared.\nSearch them one after the other."
            )
        return metrics.pop() if metrics else metric_names.VAL_LOSS

    def foreseen(self) -> list[list[str]]:
        """Overrides of what may come: each choice of task and experiment, beside one value of all other keys."""
        decide = [d for d in self._dimensions if d.key in ("task", "experiment")]
        rest = [d.examples[0] for d in self._dimensions if d not in decide]
        return [[*self._fixed, *chosen, *rest] for chosen in _combinations(decide)]

    def _composed(self, chosen: list[str]) -> RunConfig:
        return _typed(self._loader.load_sweep_config(self._sweep_config, [*self._fixed, *chosen]))

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
        notes: dict[str, Any] = {"metric": self._metric, "asked_for": self._asked_for, "pruner": pruner}
        return make_study(self.file, metric_names.lower_is_better(self._metric), self._sampler(0), notes)

    def _sampler(self, known: int) -> BaseSampler:
        """A study keeps no state of its sampler: one that goes on must not draw the first trials' values again."""
        seed = None if self.settings.seed is None else self.settings.seed + known
        if self.settings.sampler == "random":
            return RandomSampler(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            # In groups: keys that are asked for together are learnt together, whatever other trials are asked for.
            return TPESampler(n_startup_trials=self.settings.n_startup_trials, seed=seed, group=True)

    def _check_continued(self, study: Study, wanted: bool) -> None:
        folder = self.file.parent
        if not wanted:
            raise InputError(
                f"{folder} holds a search already.\n"
                "Continue it with the same command and resume=auto, or give another hydra.sweep.dir."
            )
        then, now = set(study.user_attrs["asked_for"]), set(self._asked_for)
        if then != now:
            raise InputError(
                f"{folder} holds another search: it was asked for {_in_short(then - now)}, now for "
                f"{_in_short(now - then)}.\nGive the command that it had, or another hydra.sweep.dir."
            )
        stored = [one for trial in study.get_trials(deepcopy=False) for one in trial.user_attrs.get(CHOSEN, [])]
        strange = [one for one in stored if not any(dimension.holds(one) for dimension in self._dimensions)]
        if strange:  # of a folder from somebody else, whose overrides would count as this command line's own
            raise InputError(
                f"{self.file} has a trial with {strange[0]}, which this command does not search.\n"
                "Give the command that it had, or another hydra.sweep.dir."
            )


def watched_metric(config: RunConfig) -> str:
    """The metric that a run will be judged by, as its module will say."""
    text = config.task.get("text")
    if not isinstance(text, dict) or not text.get("examples"):
        return metric_names.VAL_LOSS
    metrics = text.get("metrics") or config.data.get("metrics")
    return f"val/{metrics[0]}" if metrics else metric_names.VAL_LOSS


def _combinations(dimensions: list[Dimension]) -> Iterator[list[str]]:
    for chosen in itertools.product(*(dimension.examples for dimension in dimensions)):
        yield list(chosen)


def _typed(tree: DictConfig) -> RunConfig:
    with open_dict(tree):
        hydra = tree.pop("hydra")
    return schema.from_hydra(tree, hydra, command="")


def _in_short(arguments: set[str]) -> str:
    return " ".join(sorted(arguments)) or "nothing more"
