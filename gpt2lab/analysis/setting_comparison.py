"""Setting comparison: find the best of several settings, and those not significantly worse, from runs at several seeds.

Model: value = effect of the setting + effect of the seed + noise (a randomized block design with seeds as blocks),
fitted by least squares, so settings may lack seeds. A difference to the best of K settings is significant if it exceeds
Tukey's honestly significant difference for K means (Tukey–Kramer for unequal numbers of runs). Worse settings are then
removed and the rest is compared again with its own noise, because a setting far off is usually noisier than the others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gpt2lab.evaluation.paired_statistics import summary, t_quantile

FALSE_WINNERS = 0.04  # nominal rate if nothing differs; below the promised 5 % to allow for non-normal noise
NO_DIFFERENCE = 1e-9  # relative: rounding, not training

Runs = Mapping[str, Sequence[tuple[str, float]]]  # by setting: (seed, value) of each run, values finite


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison.

    Attributes:
        order: settings with a run, best first; ties come first.
        ties: settings not significantly worse than the best, including the best.
        gaps: (difference to the best, smallest significant difference) of each other setting. Empty if there are too
            few seeds to estimate the noise; then all are ties.
    """

    order: list[str]
    ties: list[str]
    gaps: dict[str, tuple[float, float]]

    @property
    def winner(self) -> str | None:
        """The setting significantly better than all others; None without one."""
        return self.ties[0] if len(self.order) > 1 and len(self.ties) == 1 else None


def compare(runs: Runs, lower_is_better: bool) -> Comparison:
    """Find the best setting and those not significantly worse.

    If all are equally good, at most 5 % of sweeps have a winner; if some are, one of them is called worse in about as
    many (simulated by `python -m benchmarks.simulate_sweeps`). This assumes about equal noise of all settings.
    """
    sign = 1.0 if lower_is_better else -1.0
    costs = {setting: [(seed, sign * value) for seed, value in own] for setting, own in runs.items() if own}
    gaps: dict[str, tuple[float, float]] = {}
    ties, worse = list(costs), list[str]()
    while ties:
        fit = _Fit({setting: costs[setting] for setting in ties})
        ties = sorted(ties, key=lambda setting: fit.effects[setting])
        gaps |= {setting: fit.gap(setting, ties[0]) for setting in ties[1:]} if fit.freedom else {}
        found = [setting for setting in ties[1:] if setting in gaps and gaps[setting][0] > gaps[setting][1]]
        if not found:
            break
        ties, worse = [setting for setting in ties if setting not in found], found + worse
    order = ties + worse
    return Comparison(order, ties, {setting: gaps[setting] for setting in order[1:] if setting in gaps})


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return (mean, half width of its 95 % interval: Student's t, NaN for one run); None without a run."""
    found = summary(values)
    if found.mean is None:
        return None
    if found.sd is None:
        return found.mean, math.nan
    return found.mean, t_quantile(found.n - 1) * found.sd / math.sqrt(found.n)


class _Fit:
    """Least-squares fit of setting and seed effects; only differences of `effects` are meaningful, lower is better."""

    def __init__(self, costs: Runs) -> None:
        self._index = {setting: number for number, setting in enumerate(costs)}
        rows = [(self._index[setting], seed, cost) for setting, own in costs.items() for seed, cost in own]
        seeds = {seed: number for number, seed in enumerate(dict.fromkeys(seed for _, seed, _ in rows))}
        count = len(self._index)
        design = np.zeros((len(rows), count + len(seeds)))  # (runs, settings + seeds)
        for row, (setting, seed, _) in enumerate(rows):
            design[row, setting] = design[row, count + seeds[seed]] = 1.0
        self._covariance, rank = _inverse(design)
        if rank < count + len(seeds) - 1:  # not connected by common seeds: treat the effect of a seed as noise
            design = design[:, :count]
            self._covariance, rank = _inverse(design)
        costs_of_runs = np.array([cost for _, _, cost in rows])
        fitted = self._covariance @ design.T @ costs_of_runs
        residuals = costs_of_runs - design @ fitted
        self.effects = {setting: float(fitted[number]) for setting, number in self._index.items()}
        self.freedom = len(rows) - rank
        self._variance = float(residuals @ residuals) / self.freedom if self.freedom else math.inf
        self._rounding = NO_DIFFERENCE * float(np.abs(costs_of_runs).max())

    def gap(self, setting: str, best: str) -> tuple[float, float]:
        """Return (difference of `setting` to `best`, smallest significant difference)."""
        i, j = self._index[setting], self._index[best]
        spread = self._covariance[i, i] + self._covariance[j, j] - 2 * self._covariance[i, j]
        margin = studentized_range(len(self._index), self.freedom) * math.sqrt(self._variance * spread / 2)
        return self.effects[setting] - self.effects[best], max(margin, self._rounding)


def _inverse(design: np.ndarray) -> tuple[np.ndarray, int]:
    """Return (covariance of the coefficients in units of the noise variance, rank of the design)."""
    gram = design.T @ design
    inverse = np.linalg.pinv(gram, hermitian=True)
    return inverse, round(float(np.trace(inverse @ gram)))


@lru_cache
def studentized_range(count: int, freedom: int) -> float:
    """Quantile of the range of `count` equal means, exceeded with probability FALSE_WINNERS, in standard errors."""
    from scipy.stats import studentized_range as distribution  # takes a second to import

    return float(distribution.ppf(1 - FALSE_WINNERS, count, freedom))
