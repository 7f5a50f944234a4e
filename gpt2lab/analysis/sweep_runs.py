"""Sweep runs: the runs of a sweep gathered by setting, and what they say of one another in one sentence.

A setting is what the sweep varies, the seed aside. Settings are compared that are judged by the same metric on the same
data.
"""

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING

from gpt2lab import metric_names
from gpt2lab.analysis.setting_comparison import Comparison, compare, mean_interval
from gpt2lab.analysis.sweep_axes import short_names
from gpt2lab.evaluation.document_losses import DocumentLosses, loss_difference, mean_losses
from gpt2lab.settings import OBJECTIVES

if TYPE_CHECKING:
    from gpt2lab.evaluation.jackknife import DocumentDifference

SEED = "seed"
UNFINISHED = ("waiting", "running")
DATA_KEYS = ("data", "path", "val_path", "val_fraction", "source", "target")  # change what is measured
TOKEN_KEYS = ("tokenizer", "vocab_size")  # change what a token is, and with it a loss of each token
OWN_TARGETS = [name for name, kind in OBJECTIVES.items() if kind.rewrites_text]
NAMED = 4  # settings in a sentence


@dataclass(frozen=True)
class SweepRun:
    """One job and what became of it.

    Attributes:
        page: its report.html, relative to the sweep's folder; empty where there is none.
        told: what it was told of the keys that differ between the sweep's runs, the seed included.
        metric: that it is judged by; empty where it is not known.
        value: of that metric; None where the run did not finish, or not with a number.
        data: hash of its data.
        curve: (step, value) of that metric.
        documents: its last validation by document; None where it has none.
    """

    number: int
    status: str
    error: str
    page: str
    told: dict[str, str]
    metric: str
    value: float | None
    seconds: float | None
    command: str
    data: str
    curve: list[tuple[int, float]]
    documents: DocumentLosses | None = None

    @property
    def outcome(self) -> str:
        """Its status; of a run that finished without a number, that."""
        return "no number" if self.status == "finished" and self.value is None else self.status


@dataclass(frozen=True)
class Setting:
    """The runs that were told the same but for the seed.

    Attributes:
        told: by key, what is told in this sweep.
        name: the same in words.
    """

    told: dict[str, str]
    name: str
    runs: list[SweepRun]

    @cached_property
    def values(self) -> list[tuple[str, float]]:
        """(seed, value) of the runs that have a value; the same run twice says nothing new."""
        return list({run.told.get(SEED, ""): run.value for run in self.runs if run.value is not None}.items())

    @cached_property
    def mean(self) -> tuple[float, float] | None:
        """Mean and half the width of its 95 % interval, NaN for one run; None without a run."""
        return mean_interval([value for _, value in self.values])

    @cached_property
    def documents(self) -> dict[str, DocumentLosses | None]:
        """The last validation by document of each run with a value, by seed."""
        return {run.told.get(SEED, ""): run.documents for run in self.runs if run.value is not None}

    @property
    def document_error(self) -> float | None:
        """Standard error of the mean loss over seeds between documents; apart from the error between seeds."""
        mean = mean_losses(list(self.documents.values()))
        return mean.standard_error if mean else None

    @property
    def seconds(self) -> float | None:
        """Of a run that has a value, on average."""
        known = [run.seconds for run in self.runs if run.value is not None and run.seconds is not None]
        return fmean(known) if known else None

    @property
    def statuses(self) -> str:
        """What became of its runs: "finished", or "2 finished, 1 failed"."""
        counts = Counter(run.outcome for run in self.runs)
        return next(iter(counts)) if len(self.runs) == 1 else ", ".join(f"{n} {status}" for status, n in counts.items())

    @property
    def lost(self) -> int:
        """How many of its runs are over and have no value."""
        return sum(run.value is None and run.status not in UNFINISHED for run in self.runs)


@dataclass(frozen=True)
class Contest:
    """Settings judged by one metric on the same data.

    Attributes:
        settings: those with a value, best first.
        apart: what makes this contest another one than the sweep's others, in words.
    """

    metric: str
    apart: str
    settings: list[Setting]
    comparison: Comparison

    @property
    def best(self) -> Setting:
        """The winner, or the best seen."""
        return self.settings[0]

    def by_document(self, setting: Setting) -> "DocumentDifference | None":
        """The setting's loss minus the best one's, paired by document; the mean over the seeds that both have.

        None where the metric is another, or the two did not validate on the same targets.
        """
        if self.metric != metric_names.VAL_LOSS or setting is self.best:
            return None
        seeds = setting.documents.keys() & self.best.documents.keys()
        ours, theirs = (mean_losses([one.documents[seed] for seed in sorted(seeds)]) for one in (setting, self.best))
        return loss_difference(ours, theirs)

    @property
    def best_command(self) -> str:
        """That trains the best setting again: the command of its first run with a value."""
        return next(run.command for run in self.best.runs if run.value is not None)

    def standing(self, setting: Setting) -> str:
        """winner, best seen, tie, or nothing."""
        if setting.name not in self.comparison.alike:
            return ""
        if len(self.settings) == 1:
            return "only one"
        if setting.name == self.comparison.winner:
            return "winner"
        return "best seen" if setting is self.best else "tie" if self.comparison.behind else ""


@dataclass(frozen=True)
class SweepResults:
    """A sweep as far as it has come.

    Attributes:
        keys: that differ between its settings.
        shared: overrides that all runs have.
        settings: all of them; of each contest best first, then those without a value.
    """

    keys: list[str]
    shared: list[str]
    settings: list[Setting]
    contests: list[Contest]

    @property
    def runs(self) -> list[SweepRun]:
        """All runs, by number."""
        return sorted((run for setting in self.settings for run in setting.runs), key=lambda run: run.number)

    @property
    def is_over(self) -> bool:
        """Whether no run is still to come: all are over, or the sweep was stopped in the midst of one."""
        statuses = {run.status for run in self.runs}
        return "stopped" in statuses or not statuses & set(UNFINISHED)

    @property
    def has_seeds(self) -> bool:
        """Whether some setting has several runs."""
        return any(len(setting.runs) > 1 for setting in self.settings)


def gathered(runs: Sequence[SweepRun], shared: list[str]) -> SweepResults:
    """Put runs of one setting together, compare the settings, order them."""
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.told) if key != SEED]
    short = short_names(keys)
    by_setting: dict[tuple[str, ...], list[SweepRun]] = {}
    for run in runs:
        by_setting.setdefault(tuple(run.told.get(key, "") for key in keys), []).append(run)
    settings = [_setting(dict(zip(keys, told, strict=True)), short, own) for told, own in by_setting.items()]
    by_measure: dict[tuple[str, ...], list[Setting]] = {}
    for setting in settings:
        if setting.values:
            by_measure.setdefault(_measure(setting), []).append(setting)
    contests = [_contest(measure, own) for measure, own in by_measure.items()]
    ordered = [setting for contest in contests for setting in contest.settings]
    return SweepResults(keys, shared, ordered + [one for one in settings if not one.values], contests)


def _setting(told: dict[str, str], short: Mapping[str, str], runs: list[SweepRun]) -> Setting:
    words = shlex.join(f"{short[key]}={value}" for key, value in told.items() if value)
    return Setting(told, words or ("the default" if told else "the one setting"), runs)


def _measure(setting: Setting) -> tuple[str, ...]:
    """What its values measure: the metric, then what else sets it apart; equal for settings that can be compared."""
    run = next(run for run in setting.runs if run.value is not None)
    told = {key: value for key, value in setting.told.items() if value}
    apart = [f"{key}={told[key]}" for key in told if key.split(".")[0] in DATA_KEYS]
    if metric_names.lower_is_better(run.metric):
        apart += [f"{key}={told[key]}" for key in told if key.split(".")[0] in TOKEN_KEYS]
        objective = told.get("objective", "")
        apart += [f"objective={objective}"] if objective in OWN_TARGETS else []
        if {"teacher", "init"} & told.keys():  # their tokenizers may differ
            apart.append(f"data {run.data}")
    return (run.metric, *apart)


def _contest(measure: tuple[str, ...], settings: list[Setting]) -> Contest:
    metric, *apart = measure
    by_name = {setting.name: setting for setting in settings}
    found = compare({name: setting.values for name, setting in by_name.items()}, metric_names.lower_is_better(metric))
    return Contest(metric, " ".join(apart), [by_name[name] for name in found.order], found)


def in_one_sentence(contest: Contest) -> str:
    """Who won, or who is as good as the best, and how sure that is."""
    best, settings = contest.best, contest.settings
    seeds = f", mean of {len(best.values)}" if len(best.values) > 1 else ""
    told = f"{best.name} ({contest.metric} {value_in_words(best)}{seeds})"
    lost = f" {best.lost} of its {len(best.runs)} runs gave no value." if best.lost else ""
    if len(settings) == 1:
        return f"Only one setting has a value: {told}.{lost}"
    if contest.comparison.winner:
        rest = f"{len(settings) - 1} settings" if len(settings) > 2 else "setting"
        return f"Winner: {told}, better than the other {rest}.{lost}"
    if not contest.comparison.behind:
        one_each = all(len(setting.values) == 1 for setting in settings)
        why = "one seed each" if one_each else "too few seeds in common"
        return f"Best seen: {told}. With {why} this may be luck: sweep over seed=1,2,3 too.{lost}"
    others = [setting.name for setting in settings[1:] if setting.name in contest.comparison.alike]
    named = ", ".join(others[:NAMED]) + (f" and {len(others) - NAMED} more" if len(others) > NAMED else "")
    worse = len(settings) - 1 - len(others)
    rest = f"; {worse} setting{'s are' if worse > 1 else ' is'} worse" if worse else ""
    return f"A tie, no winner: best seen is {told}, and no difference is shown to {named}{rest}.{lost}"


def behind_in_words(contest: Contest | None, setting: Setting) -> str:
    """`0.0513 ± 0.0214`: how much worse than the best, and how much it takes to count."""
    found = contest.comparison.behind.get(setting.name) if contest else None
    return f"{found[0]:.4f} ± {found[1]:.4f}" if found else ""


def document_error_in_words(contest: Contest | None, setting: Setting) -> str:
    """The standard error between documents; nothing where the metric is no loss."""
    error = setting.document_error if contest and contest.metric == metric_names.VAL_LOSS else None
    return "" if error is None else f"{error:.4f}"


def document_difference_in_words(contest: Contest | None, setting: Setting) -> str:
    """`0.0513 (0.0402 … 0.0624)`: the difference to the best, paired by document, with its 95 % interval."""
    found = contest.by_document(setting) if contest else None
    if found is None:
        return ""
    interval = "" if found.low is None or found.high is None else f" ({found.low:.4f} … {found.high:.4f})"
    return f"{found.value:.4f}{interval}".replace("-", "−")


def value_in_words(setting: Setting) -> str:
    """`3.9712 ± 0.0211`; without ± for one run, nothing where there is no value."""
    if setting.mean is None:
        return ""
    mean, half = setting.mean
    return f"{mean:.4f}" if math.isnan(half) else f"{mean:.4f} ± {half:.4f}"
