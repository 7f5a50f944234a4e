"""Paired statistics: comparison of two settings by their losses at the same seeds.

Differences are taken within each seed, so that an effect of the seed on both sides cancels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (n − 1); `sd` is None below two values."""

    n: int
    mean: float | None
    sd: float | None


@dataclass(frozen=True)
class PairedDifference:
    """Difference first − second, paired by seed.

    Attributes:
        differences: by seed, where both sides are finite.
        missing: seeds without a difference.
        low, high: ends of Student's t interval of the mean; None below two pairs.
    """

    differences: dict[int, float]
    missing: list[int]
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None


def summary(values: Sequence[float]) -> Summary:
    """Compute mean and standard deviation."""
    n = len(values)
    return Summary(n, fmean(values) if n else None, stdev(values) if n > 1 else None)


def paired_difference(first: Mapping[int, float | None], second: Mapping[int, float | None]) -> PairedDifference:
    """Compare two sides seed by seed; a seed without a finite value on both sides is left out."""
    seeds = sorted(first.keys() | second.keys())
    pairs = {seed: (first.get(seed), second.get(seed)) for seed in seeds}
    differences = {
        seed: ours - theirs
        for seed, (ours, theirs) in pairs.items()
        if ours is not None and theirs is not None and math.isfinite(ours - theirs)
    }
    found = summary(list(differences.values()))
    low = high = None
    if found.mean is not None and found.sd is not None:
        half = t_quantile(found.n - 1) * found.sd / math.sqrt(found.n)
        low, high = found.mean - half, found.mean + half
    missing = [seed for seed in seeds if seed not in differences]
    return PairedDifference(differences, missing, found.mean, found.sd, low, high)


def verdict(found: PairedDifference, first: str, second: str) -> str:
    """Summarize a difference of losses in nats in one sentence; a lower loss wins."""
    n = len(found.differences)
    left_out = f"; left out: seed{'s' * (len(found.missing) > 1)} {', '.join(map(str, found.missing))}"
    left_out = left_out if found.missing else ""
    if found.mean is None:
        return f"no comparison: no pair of runs finished{left_out}"
    winner, loser = (first, second) if found.mean < 0 else (second, first)
    if found.sd is None or found.low is None or found.high is None:
        return f"one seed: no interval; {winner} is {abs(found.mean):.3f} nats below {loser}{left_out}"
    if found.low <= 0 <= found.high:
        interval = f"interval {_signed(found.low)} … {_signed(found.high)} includes 0"
        return f"no difference shown with {n} seeds ({interval}{left_out})"
    near, far = sorted((abs(found.low), abs(found.high)))
    interval = f"{CONFIDENCE:.0%} interval {near:.3f} … {far:.3f}, {n} seeds".replace("%", " %")
    return f"{winner} beats {loser} by {abs(found.mean):.3f} ± {found.sd:.3f} nats ({interval}{left_out})"


def _signed(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Return the two-sided quantile of Student's t distribution.

    Args:
        freedom: degrees of freedom, at least 1.
    """
    from scipy.special import stdtrit  # takes half a second to import

    return float(stdtrit(freedom, (1 + confidence) / 2))
