"""Sweep runs: the runs of a sweep grouped by setting, and the comparison of settings.

A setting is a combination of varied keys without the seed. Only settings with the same metric and data are compared.
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
from gpt2lab.analysis.sweep_axes import override_value, short_names
from gpt2lab.evaluation.document_losses import DocumentLosses, loss_difference, mean_losses
from gpt2lab.number_format import column_decimals, fixed, significant
from gpt2lab.settings import OBJECTIVES

if TYPE_CHECKING:
    from gpt2lab.evaluation.jackknife import DocumentDifference

SEED = "seed"
UNFINISHED = ("waiting", "running")
DATA_KEYS = (
    "data",
    "path",
    "val_path",
    "val_fraction",
    "validate_tokens",
    "source",
    "target",
)  # change what is measured
TOKEN_KEYS = ("tokenizer", "vocab_size")  # change what a token is, and with it a loss of each token
# objectives whose targets are not all next tokens
OWN_TARGETS = [name for name, kind in OBJECTIVES.items() if kind.rewrites_text]
MOST_KEYS = 4  # in the name of a setting; runs that differ in more keys have their names, as has a single named run
NAMED = 4  # maximum number of settings named in the summary


@dataclass(frozen=True)
class SweepRun:
    """One job and its result.

    Attributes:
        page: its report.html, relative to the sweep's folder; empty without one.
        overrides: its values of the keys that differ between the sweep's runs, including the seed.
        metric: watched metric; empty if unknown.
        value: value of that metric; None if the run did not finish or the value is not finite.
        data: hash of its data.
        curve: (step, value) of that metric.
        documents: its last validation by document; None without one.
        name: name to show; empty for a job, which has its number.
    """

    number: int
    status: str
    error: str
    page: str
    overrides: dict[str, str]
    metric: str
    value: float | None
    seconds: float | None
    command: str
    data: str
    curve: list[tuple[int, float]]
    documents: DocumentLosses | None = None
    name: str = ""

    @property
    def outcome(self) -> str:
        """Its status, or "no number" for a finished run without a value."""
        return "no number" if self.status == "finished" and self.value is None else self.status


@dataclass(frozen=True)
class Setting:
    """Runs with equal overrides except for the seed.

    Attributes:
        overrides: varied key → value.
        name: the overrides as text.
    """

    overrides: dict[str, str]
    name: str
    runs: list[SweepRun]

    @property
    def label(self) -> str:
        """Its name with three significant digits of each number."""
        words = (word.partition("=") for word in self.name.split(" "))
        return " ".join(f"{key}{equals}{override_value(value)}" for key, equals, value in words)

    @cached_property
    def values(self) -> list[tuple[str, float]]:
        """List of (seed, value) of the runs with a value, each seed once."""
        return list({run.overrides.get(SEED, ""): run.value for run in self.runs if run.value is not None}.items())

    @cached_property
    def mean(self) -> tuple[float, float] | None:
        """Mean and half width of its 95 % interval (NaN for one run); None without a run."""
        return mean_interval([value for _, value in self.values])

    @cached_property
    def documents(self) -> dict[str, DocumentLosses | None]:
        """Seed → last validation by document, of the runs with a value."""
        return {run.overrides.get(SEED, ""): run.documents for run in self.runs if run.value is not None}

    @property
    def document_error(self) -> float | None:
        """Standard error of the mean loss over seeds between documents; excludes the error between seeds."""
        mean = mean_losses(list(self.documents.values()))
        return mean.standard_error if mean else None

    @property
    def seconds(self) -> float | None:
        """Mean seconds of the runs with a value."""
        known = [run.seconds for run in self.runs if run.value is not None and run.seconds is not None]
        return fmean(known) if known else None

    @property
    def statuses(self) -> str:
        """Statuses of its runs: "finished", or "2 finished, 1 failed"."""
        counts = Counter(run.outcome for run in self.runs)
        return next(iter(counts)) if len(self.runs) == 1 else ", ".join(f"{n} {status}" for status, n in counts.items())

    @property
    def lost(self) -> int:
        """Number of its ended runs without a value."""
        return sum(run.value is None and run.status not in UNFINISHED for run in self.runs)


@dataclass(frozen=True)
class SettingGroup:
    """Settings with the same metric and data, which can be compared.

    Attributes:
        condition: the overrides that distinguish this group from the sweep's others.
        settings: those with a value, best first.
    """

    metric: str
    condition: str
    settings: list[Setting]
    comparison: Comparison

    @property
    def decimals(self) -> int:
        """Decimals of the means in tables."""
        means = [setting.mean[0] for setting in self.settings if setting.mean is not None]
        return column_decimals(means, metric_names.lower_is_better(self.metric))

    @property
    def best(self) -> Setting:
        """The winner, or the best seen so far."""
        return self.settings[0]

    def by_document(self, setting: Setting) -> "DocumentDifference | None":
        """Return the setting's loss minus the best one's, paired by document; mean over the seeds of both.

        None for another metric than val/loss, or if the two were not validated on the same targets.
        """
        if self.metric != metric_names.VAL_LOSS or setting is self.best:
            return None
        seeds = setting.documents.keys() & self.best.documents.keys()
        ours, theirs = (mean_losses([one.documents[seed] for seed in sorted(seeds)]) for one in (setting, self.best))
        return loss_difference(ours, theirs)

    @property
    def best_command(self) -> str:
        """Command of the best setting's first run with a value."""
        return next(run.command for run in self.best.runs if run.value is not None)

    def status_of(self, setting: Setting) -> str:
        """Return "winner", "best seen", "only one", "tie", or ""."""
        if setting.name not in self.comparison.ties:
            return ""
        if len(self.settings) == 1:
            return "only one"
        if setting.name == self.comparison.winner:
            return "winner"
        return "best seen" if setting is self.best else "tie" if self.comparison.gaps else ""


@dataclass(frozen=True)
class SweepResults:
    """Results of a sweep, complete or not.

    Attributes:
        keys: keys that differ between its settings.
        shared: overrides common to all runs.
        settings: all settings, each group best first, then those without a value.
    """

    keys: list[str]
    shared: list[str]
    settings: list[Setting]
    groups: list[SettingGroup]

    @property
    def runs(self) -> list[SweepRun]:
        """All runs, by number."""
        return sorted((run for setting in self.settings for run in setting.runs), key=lambda run: run.number)

    @property
    def is_over(self) -> bool:
        """Whether no further run will end: all have, or the sweep was stopped."""
        statuses = {run.status for run in self.runs}
        return "stopped" in statuses or not statuses & set(UNFINISHED)

    @property
    def has_seeds(self) -> bool:
        """Whether some setting has several runs."""
        return any(len(setting.runs) > 1 for setting in self.settings)


def group_runs(runs: Sequence[SweepRun], shared: list[str]) -> SweepResults:
    """Group runs by setting, then compare and order the settings."""
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.overrides) if key != SEED]
    short = short_names(keys)
    by_setting: dict[tuple[str, ...], list[SweepRun]] = {}
    for run in runs:
        by_setting.setdefault(tuple(run.overrides.get(key, "") for key in keys), []).append(run)
    settings = [_setting(dict(zip(keys, values, strict=True)), short, own) for values, own in by_setting.items()]
    by_measure: dict[tuple[str, ...], list[Setting]] = {}
    for setting in settings:
        if setting.values:
            by_measure.setdefault(_measure(setting), []).append(setting)
    groups = [_group(measure, own) for measure, own in by_measure.items()]
    ordered = [setting for group in groups for setting in group.settings]
    return SweepResults(keys, shared, ordered + [one for one in settings if not one.values], groups)


def _setting(overrides: dict[str, str], short: Mapping[str, str], runs: list[SweepRun]) -> Setting:
    has_many, is_named = len(overrides) > MOST_KEYS, len(runs) == 1 and not runs[0].name.isdecimal()
    named = [run.name for run in runs if run.name] if has_many or is_named else []
    name = ", ".join(named) or shlex.join(f"{short[key]}={value}" for key, value in overrides.items() if value)
    return Setting(overrides, name or ("the default" if overrides else "the one setting"), runs)


def _measure(setting: Setting) -> tuple[str, ...]:
    """Return (metric, overrides that affect the data or targets…); equal for settings that can be compared."""
    run = next(run for run in setting.runs if run.value is not None)
    given = {key: value for key, value in setting.overrides.items() if value}
    condition = [f"{key}={given[key]}" for key in given if key.split(".")[0] in DATA_KEYS]
    if metric_names.lower_is_better(run.metric):
        condition += [f"{key}={given[key]}" for key in given if key.split(".")[0] in TOKEN_KEYS]
        objective = given.get("objective", "")
        condition += [f"objective={objective}"] if objective in OWN_TARGETS else []
        if {"teacher", "init"} & given.keys():  # their tokenizers may differ
            condition.append(f"data {run.data}")
    return (run.metric, *condition)


def _group(measure: tuple[str, ...], settings: list[Setting]) -> SettingGroup:
    metric, *condition = measure
    by_name = {setting.name: setting for setting in settings}
    found = compare({name: setting.values for name, setting in by_name.items()}, metric_names.lower_is_better(metric))
    return SettingGroup(metric, " ".join(condition), [by_name[name] for name in found.order], found)


def summarize(group: SettingGroup) -> str:
    """Return one sentence with the winner or the ties, and the evidence."""
    best, settings = group.best, group.settings
    seeds = f", mean of {len(best.values)}" if len(best.values) > 1 else ""
    leader = f"{best.label} ({group.metric} {format_value(group, best)}{seeds})"
    lost = f" {best.lost} of its {len(best.runs)} runs gave no value." if best.lost else ""
    if len(settings) == 1:
        return f"Only one setting has a value: {leader}.{lost}"
    if group.comparison.winner:
        rest = f"{len(settings) - 1} settings" if len(settings) > 2 else "setting"
        return f"Winner: {leader}, better than the other {rest}.{lost}"
    if not group.comparison.gaps:
        one_each = all(len(setting.values) == 1 for setting in settings)
        why = "one seed each" if one_each else "too few seeds in common"
        return f"Best seen: {leader}. With {why} this may be chance: sweep over seed=1,2,3 too.{lost}"
    others = [setting.label for setting in settings[1:] if setting.name in group.comparison.ties]
    named = ", ".join(others[:NAMED]) + (f" and {len(others) - NAMED} more" if len(others) > NAMED else "")
    worse = len(settings) - 1 - len(others)
    rest = f"; {worse} setting{'s are' if worse > 1 else ' is'} worse" if worse else ""
    return f"A tie, no winner: best seen is {leader}, not significantly better than {named}{rest}.{lost}"


def format_gap(group: SettingGroup | None, setting: Setting) -> str:
    """Format as `0.0513 ± 0.0214`: difference to the best ± smallest significant difference."""
    found = group.comparison.gaps.get(setting.name) if group else None
    return f"{significant(found[0])} ± {significant(found[1])}" if found else ""


def format_document_error(group: SettingGroup | None, setting: Setting) -> str:
    """Format the standard error between documents; empty for another metric than val/loss."""
    error = setting.document_error if group and group.metric == metric_names.VAL_LOSS else None
    return "" if error is None else significant(error)


def format_document_difference(group: SettingGroup | None, setting: Setting) -> str:
    """Format as `0.0513 (0.0402 … 0.0624)`: difference to the best, paired by document, with its 95 % interval."""
    found = group.by_document(setting) if group else None
    if found is None:
        return ""
    interval = (
        "" if found.low is None or found.high is None else f" ({significant(found.low)} … {significant(found.high)})"
    )
    return f"{significant(found.value)}{interval}"


def format_value(group: SettingGroup | None, setting: Setting) -> str:
    """Format as `3.97 ± 0.0211`; without ± for one run, empty without a value."""
    if group is None or setting.mean is None:
        return ""
    mean, half = setting.mean
    return fixed(mean, group.decimals) + ("" if math.isnan(half) else f" ± {significant(half)}")
