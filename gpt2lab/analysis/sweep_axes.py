"""Varied keys: the values that one key takes in a sweep, as places on an axis and as levels that can be compared."""

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

LOG_SPAN = 10.0 * (1 - 1e-9)  # numbers that span a factor of 10, rounding aside, are seen by their logarithms
MOST_LEVELS = 5  # of numbers; more are gathered into neighbourhoods
FOOT = 0.12  # of an axis of numbers, where the runs stand that have none


class VariedKey:
    """One key's values, one for each run or setting; "" where the run was told none.

    Attributes:
        is_number: all values that were told are finite numbers.
        is_log: they are best told apart by their logarithms.
    """

    def __init__(self, values: Sequence[str]) -> None:
        self.values = list(values)
        told = [value for value in self.values if value]
        numbers = [_number(value) for value in told]
        self.is_number = bool(told) and all(math.isfinite(number) for number in numbers)
        self.is_log = self.is_number and min(numbers) > 0 and max(numbers) / min(numbers) >= LOG_SPAN

    @cached_property
    def places(self) -> list[float]:
        """Where each value stands on an axis from 0 to 1."""
        if not self.is_number:
            order = {value: number for number, value in enumerate(dict.fromkeys(self.values))}
            return [order[value] / max(len(order) - 1, 1) for value in self.values]
        told = [self._size(value) for value in self.values if value]
        low, span = min(told), max(told) - min(told) or 1.0
        foot = FOOT if len(told) < len(self.values) else 0.0
        return [foot + (1 - foot) * (self._size(value) - low) / span if value else 0.0 for value in self.values]

    def levels(self) -> list[int]:
        """Which group each value is in: of equal words, of equal numbers, or of neighbouring numbers if many."""
        distinct = sorted(set(self.values))
        most = max(2, min(MOST_LEVELS, len(self.values) // 2))
        if not self.is_number or len(distinct) <= most:
            return [distinct.index(value) for value in self.values]
        sizes = [self._size(value) for value in self.values if value]
        edges = np.quantile(sizes, np.linspace(0, 1, most + 1)[1:-1])
        return [1 + int(np.searchsorted(edges, self._size(told), side="right")) if told else 0 for told in self.values]

    def _size(self, value: str) -> float:
        return math.log(_number(value)) if self.is_log else _number(value)


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return math.nan


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key by its last part, where that is enough to know it: `optimizer.lr` → `lr`."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}
