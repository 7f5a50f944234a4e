"""Jackknife standard errors of figures that are functions of sums over documents: loss, ECE, agreement, …

Shapes: G groups of targets (documents, gpt2lab/data/document_groups.py).

Tokens of a document are not independent; documents nearly are. The delete-one-cluster jackknife leaves out one document
at a time and computes the standard error from the spread of the figure. It applies to any function of the sums, such as
a mean over targets, the ratio of two sums over documents of unequal length. Intervals use Student's t with the degrees
of freedom of the effective number of documents, which is small if a few long documents dominate.

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
    """Sums over targets per document group, on the CPU in float64; new groups extend them.

    Attributes:
        sums: sums (G, …) by name; one of them is TOKENS.
    """

    def __init__(self) -> None:
        self.sums: Sums = {}

    def add(self, values: Sums, groups: Tensor) -> None:
        """Add values (n, …) of targets to their groups (n,)."""
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
        """Return the sums of the groups that have a target."""
        kept = self.sums[TOKENS] > 0 if self.sums else None
        return {name: value[kept] for name, value in self.sums.items()}


@dataclass(frozen=True)
class DocumentDifference:
    """Difference first − second, paired by document.

    Attributes:
        unit: nats per token, or bits per byte if the tokens differ.
        standard_error, low, high: standard error and ends of the 95 % interval; None below two documents.
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
    """Add the sums of all groups, in float64."""
    return {name: value.double().sum(0) for name, value in sums.items()}


def standard_errors(sums: Sums, figures: Callable[[Sums], Figures]) -> Figures:
    """Compute the jackknife error of each figure; empty below two groups.

    A figure that is missing when some group is left out has no error.

    Args:
        sums: (G, …) each, over groups with at least one target.
        figures: maps sums over any groups to figures.
    """
    groups = len(sums[TOKENS])
    if groups < 2:
        return {}
    whole = total(sums)
    without = [figures({name: whole[name] - sums[name][group] for name in whole}) for group in range(groups)]
    names = [name for name in without[0] if all(name in one for one in without)]
    return {name: _spread([one[name] for one in without]) for name in names}


def interval_factor(tokens: Tensor) -> float:
    """Return half the width of a 95 % interval, in standard errors.

    Args:
        tokens: (G,) number of targets of each group.
    """
    counts = tokens.double()
    effective = (counts.sum().square() / counts.square().sum()).item()  # number of groups of equal length
    return t_quantile(max(math.floor(effective - 1 + 1e-9), 1))


def mean_error(sums: Tensor, counts: Tensor) -> float | None:
    """Compute the jackknife error of Σ sums / Σ counts from (G,) each; None below two groups with a target."""
    kept = counts > 0
    sums, counts = sums[kept].double(), counts[kept].double()
    if len(counts) < 2:
        return None
    without = (sums.sum() - sums) / (counts.sum() - counts)  # the mean without each group
    return _spread(without.tolist())


def paired_mean_difference(first: Tensor, second: Tensor, counts: Tensor, unit: str = "nats") -> DocumentDifference:
    """Compute Σ (first − second) / Σ counts and its error between groups.

    Args:
        first, second: (G,) sums of two models over the same targets.
        counts: (G,) number of targets or of bytes.
    """
    kept = counts > 0
    differences, counts = (first.double() - second.double())[kept], counts.double()[kept]
    value, error = (differences.sum() / counts.sum()).item(), mean_error(differences, counts)
    half = None if error is None else error * interval_factor(counts)
    low, high = (None, None) if half is None else (value - half, value + half)
    return DocumentDifference(value, error, low, high, len(counts), unit)


def _spread(values: list[float]) -> float:
    """Return the jackknife error √((G − 1) / G · Σ (value − mean)²) of G leave-one-out values."""
    mean = sum(values) / len(values)
    return math.sqrt((len(values) - 1) / len(values) * sum((value - mean) ** 2 for value in values))
