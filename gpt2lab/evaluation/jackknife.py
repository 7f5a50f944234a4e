"""Standard errors of figures that are functions of sums over documents: loss, calibration error, agreement, …

Shapes: G groups of targets (documents, gpt2lab/data/document_groups.py).

Tokens of one document are not independent, documents nearly are. The spread of a figure when each document in turn is
left out gives its error (the delete-one-cluster jackknife), whatever function of the sums it is: a mean over targets is
a ratio of two sums over documents of unequal length. Intervals use Student's t with the degrees of freedom of as many
equally long documents: few long documents among many short ones tell little.

Source: Quenouille 1956; MacKinnon, Nielsen & Webb 2023, Fast and Reliable Jackknife and Bootstrap Methods for
Cluster-Robust Inference; Kish 1965 for the effective number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2lab.evaluation.paired_statistics import t_quantile

TOKENS = "tokens"  # name of the sum that counts targets

Sums = dict[str, Tensor]  # by name; any shape
Figures = dict[str, float]


class GroupedSums:
    """Sums over targets by group, grown as groups appear; on the CPU in float64.

    Attributes:
        sums: by name, (G, …); one of them is TOKENS.
    """

    def __init__(self) -> None:
        self.sums: Sums = {}

    def add(self, values: Sums, groups: Tensor) -> None:
        """Add values of targets, (n, …) each, to the groups (n,) that these belong to."""
        if not len(groups):
            return
        needed = int(groups.max()) + 1
        for name, value in values.items():
            value = value.detach().cpu().double()
            known = self.sums.get(name, value.new_zeros((0, *value.shape[1:])))
            if len(known) < needed:
                known = torch.cat([known, known.new_zeros((needed - len(known), *known.shape[1:]))])
            self.sums[name] = known.index_add(0, groups.cpu(), value)

    def scored(self) -> Sums:
        """The sums of the groups that have a target."""
        return scored(self.sums)


@dataclass(frozen=True)
class DocumentDifference:
    """First minus second, with the error of the difference within each document.

    Attributes:
        unit: nats per token, or bits per byte where the two have different tokens.
        standard_error, low, high: None below two documents; the ends of the 95 % interval.
    """

    value: float
    standard_error: float | None
    low: float | None
    high: float | None
    groups: int
    unit: str = "nats"

    def __str__(self) -> str:
        if self.standard_error is None or self.low is None or self.high is None:
            return f"{self.value:+.4f} {self.unit}, no interval: one document"
        return (
            f"{self.value:+.4f} ± {self.standard_error:.4f} {self.unit}, 95 % interval {self.low:+.4f} … "
            f"{self.high:+.4f} over {self.groups} document groups"
        ).replace("-", "−")


def total(sums: Sums) -> Sums:
    """The sums over all groups; in float64."""
    return {name: value.double().sum(0) for name, value in sums.items()}


def scored(sums: Sums) -> Sums:
    """The sums of the groups that have a target."""
    kept = sums[TOKENS] > 0 if sums else None
    return {name: value[kept] for name, value in sums.items()}


def standard_errors(sums: Sums, figures: Callable[[Sums], Figures]) -> Figures:
    """The jackknife error of every figure that exists whichever group is left out; empty below two groups.

    Args:
        sums: (G, …) each, over groups with at least one target.
        figures: from sums over any of the groups.
    """
    groups = len(sums[TOKENS])
    if groups < 2:
        return {}
    whole = total(sums)
    without = [figures({name: whole[name] - sums[name][group] for name in whole}) for group in range(groups)]
    names = [name for name in without[0] if all(name in one for one in without)]
    return {name: _spread([one[name] for one in without]) for name in names}


def interval_factor(tokens: Tensor) -> float:
    """Half the width of a 95 % interval, in standard errors.

    Args:
        tokens: (G,) targets of each group.
    """
    counts = tokens.double()
    effective = (counts.sum().square() / counts.square().sum()).item()  # equally long groups that weigh as much
    return t_quantile(max(math.floor(effective - 1 + 1e-9), 1))


def mean_error(sums: Tensor, counts: Tensor) -> float | None:
    """The jackknife error of Σ sums / Σ counts from (G,) each; None below two groups with a target."""
    kept = counts > 0
    sums, counts = sums[kept].double(), counts[kept].double()
    if len(counts) < 2:
        return None
    without = (sums.sum() - sums) / (counts.sum() - counts)  # the mean without each group
    return _spread(without.tolist())


def paired_mean_difference(first: Tensor, second: Tensor, counts: Tensor, unit: str = "nats") -> DocumentDifference:
    """Σ (first − second) / Σ counts and its error between groups.

    Args:
        first, second: (G,) sums of two models over the same targets.
        counts: (G,) what the sums are divided by: targets, or bytes.
    """
    kept = counts > 0
    apart, counts = (first.double() - second.double())[kept], counts.double()[kept]
    value, error = (apart.sum() / counts.sum()).item(), mean_error(apart, counts)
    half = None if error is None else error * interval_factor(counts)
    low, high = (None, None) if half is None else (value - half, value + half)
    return DocumentDifference(value, error, low, high, len(counts), unit)


def _spread(values: list[float]) -> float:
    """√((G − 1) / G · Σ (value − mean)²)."""
    mean = sum(values) / len(values)
    return math.sqrt((len(values) - 1) / len(values) * sum((value - mean) ** 2 for value in values))
