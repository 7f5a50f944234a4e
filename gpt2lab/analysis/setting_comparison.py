"""Setting comparison: which of several settings is best, and which are as good, from runs of each at several seeds.

A run's value is the sum of what its setting, its seed and chance do to it (a randomized block design with the seeds as
blocks); both sums are fitted by least squares, so a setting may lack seeds that others have. The best setting is chosen
after looking, out of K: a difference counts where it exceeds Tukey's honestly significant difference for K means (for
unequal numbers of runs as Kramer has it). Then the settings that were found worse are left out and the rest is compared
again, by its own noise: a setting far off is mostly a noisy one, and would hide what distinguishes the others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gpt2lab.evaluation.paired_statistics import summary, t_quantile

FALSE_WINNERS = 0.04  # how often at most, where nothing differs; below the promised 5 % for noise that is not normal
NO_DIFFERENCE = 1e-9  # relative: rounding, not training

Runs = Mapping[str, Sequence[tuple[str, float]]]  # by setting: (seed, value) of each run, values finite


@dataclass(frozen=True)
class Comparison:
    """What runs say about settings.

    Attributes:
        order: the settings that have a run, best first; first those that are alike.
        alike: those of them that are not shown to be worse than the best, itself among them.
        behind: how much worse each other setting is than the best, and how much it takes to count. Empty where the
            noise is unknown because seeds are too few; then all are alike.
    """

    order: list[str]
    alike: list[str]
    behind: dict[str, tuple[float, float]]

    @property
    def winner(self) -> str | None:
        """The setting that beats all others, if there is one."""
        return self.alike[0] if len(self.order) > 1 and len(self.alike) == 1 else None


def compare(runs: Runs, lower_is_better: bool) -> Comparison:
    """Find the best setting and those that are as good, as far as the runs can tell.

    Where all are equally good, a winner is named in at most 5 % of sweeps, and where some are, one of them is called
    worse in about as many, as simulated by `python -m benchmarks.simulate_sweeps`. This holds for settings that are
    about equally noisy.
    """
    sign = 1.0 if lower_is_better else -1.0
    costs = {setting: [(seed, sign * value) for seed, value in own] for setting, own in runs.items() if own}
    behind: dict[str, tuple[float, float]] = {}
    alike, worse = list(costs), list[str]()
    while alike:
        fit = _Fit({setting: costs[setting] for setting in alike})
        alike = sorted(alike, key=lambda setting: fit.effects[setting])
        behind |= {setting: fit.behind(setting, alike[0]) for setting in alike[1:]} if fit.freedom else {}
        found = [setting for setting in alike[1:] if setting in behind and behind[setting][0] > behind[setting][1]]
        if not found:
            break
        alike, worse = [setting for setting in alike if setting not in found], found + worse
    order = alike + worse
    return Comparison(order, alike, {setting: behind[setting] for setting in order[1:] if setting in behind})


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean of a setting's runs and half its 95 % interval (Student's t; NaN for one run); None for no run."""
    found = summary(values)
    if found.mean is None:
        return None
    if found.sd is None:
        return found.mean, math.nan
    return found.mean, t_quantile(found.n - 1) * found.sd / math.sqrt(found.n)


class _Fit:
    """Effects of settings and seeds by least squares. `effects` are comparable with one another, lower is better."""

    def __init__(self, costs: Runs) -> None:
        self._index = {setting: number for number, setting in enumerate(costs)}
        rows = [(self._index[setting], seed, cost) for setting, own in costs.items() for seed, cost in own]
        seeds = {seed: number for number, seed in enumerate(dict.fromkeys(seed for _, seed, _ in rows))}
        count = len(self._index)
        design = np.zeros((len(rows), count + len(seeds)))  # (runs, settings + seeds)
        for row, (setting, seed, _) in enumerate(rows):
            design[row, setting] = design[row, count + seeds[seed]] = 1.0
        self._covariance, rank = _inverse(design)
        if rank < count + len(seeds) - 1:  # no chain of common seeds joins the settings: what a seed does is chance too
            design = design[:, :count]
            self._covariance, rank = _inverse(design)
        costs_of_runs = np.array([cost for _, _, cost in rows])
        fitted = self._covariance @ design.T @ costs_of_runs
        residuals = costs_of_runs - design @ fitted
        self.effects = {setting: float(fitted[number]) for setting, number in self._index.items()}
        self.freedom = len(rows) - rank
        self._variance = float(residuals @ residuals) / self.freedom if self.freedom else math.inf
        self._rounding = NO_DIFFERENCE * float(np.abs(costs_of_runs).max())

    def behind(self, setting: str, best: str) -> tuple[float, float]:
        """How much worse `setting` is than `best`, the best of all that were fitted, and how much it takes to count."""
        i, j = self._index[setting], self._index[best]
        spread = self._covariance[i, i] + self._covariance[j, j] - 2 * self._covariance[i, j]
        margin = studentized_range(len(self._index), self.freedom) * math.sqrt(self._variance * spread / 2)
        return self.effects[setting] - self.effects[best], max(margin, self._rounding)


def _inverse(design: np.ndarray) -> tuple[np.ndarray, int]:
    """Covariance of least-squares coefficients in variances of the noise, and the design's rank."""
    gram = design.T @ design
    inverse = np.linalg.pinv(gram, hermitian=True)
    return inverse, round(float(np.trace(inverse @ gram)))


@lru_cache
def studentized_range(count: int, freedom: int) -> float:
    """What the range of `count` equal means exceeds with probability FALSE_WINNERS, in standard errors of a mean."""
    from scipy.stats import studentized_range as distribution  # a second to import, which training need not wait for

    return float(distribution.ppf(1 - FALSE_WINNERS, count, freedom))
