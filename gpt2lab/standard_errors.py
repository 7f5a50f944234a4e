"""Standard errors of figures that are functions of sums over rows of text: loss, calibration error, agreement, …

Shapes: R rows (windows or pairs, in the order of the text), G groups of neighbours.

Tokens of one text are not independent, nor are neighbouring windows; groups of neighbouring rows nearly are. What a
figure becomes when each group in turn is left out tells its error (the delete-a-group jackknife), whatever function of
the sums it is.

Source: Quenouille 1956; Künsch 1989, The Jackknife and the Bootstrap for General Stationary Observations.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

MOST_GROUPS = 200

Sums = dict[str, Tensor]  # by name; any shape, the same in every row
Figures = dict[str, float]


def total(rows: Sequence[Sums]) -> Sums:
    """The sums of all rows; in float64."""
    return {name: torch.stack([row[name].double() for row in rows]).sum(0) for name in rows[0]}


def standard_errors(rows: Sequence[Sums], figures: Callable[[Sums], Figures]) -> Figures:
    """Of every figure that each part of the rows has; none where there is a single row.

    Args:
        rows: one dictionary for each row that has a target.
        figures: from sums over any of the rows.
    """
    groups = min(len(rows), MOST_GROUPS)
    if groups < 2:
        return {}
    bounds = [len(rows) * number // groups for number in range(groups + 1)]
    parts = [total(rows[start:end]) for start, end in pairwise(bounds)]
    whole = total(parts)
    without = [figures({name: whole[name] - part[name] for name in whole}) for part in parts]
    names = [name for name in without[0] if all(name in one for one in without)]
    return {name: _spread([one[name] for one in without]) for name in names}


def _spread(values: list[float]) -> float:
    """√((G − 1) / G · Σ (value − mean)²)."""
    mean = sum(values) / len(values)
    return math.sqrt((len(values) - 1) / len(values) * sum((value - mean) ** 2 for value in values))
