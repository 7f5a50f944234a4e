"""Varied keys: values of one key in a sweep, as positions on an axis and as levels of a factor."""

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

LOG_SPAN = 10.0 * (1 - 1e-9)  # from a factor of 10 on (up to rounding) the axis is logarithmic
MOST_LEVELS = 5  # more distinct numbers are binned
NUMBER = re.compile(r"[+-]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?")
MOST_DIGITS = 7  # characters of a round number that is shown in full
FOOT = 0.12  # share of a numeric axis reserved for runs without a value


def varied_values(given: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return of each run its values of the keys in which the runs differ."""
    keys = dict.fromkeys(key for own in given for key in own)
    varied = [key for key in keys if len({own.get(key) for own in given}) > 1]
    return [{key: own[key] for key in varied if key in own} for own in given]


class VariedKey:
    """Values of one key, one per run or setting; "" for a run without an override.

    Attributes:
        is_number: whether all values are finite numbers.
        is_log: whether the axis is logarithmic.
    """

    def __init__(self, values: Sequence[str]) -> None:
        self.values = list(values)
        numbers = [_number(value) for value in self.values if value]
        self.is_number = bool(numbers) and all(math.isfinite(number) for number in numbers)
        self.is_log = self.is_number and min(numbers) > 0 and max(numbers) / min(numbers) >= LOG_SPAN

    @cached_property
    def positions(self) -> list[float]:
        """Position of each value on an axis from 0 to 1."""
        if not self.is_number:
            order = {value: number for number, value in enumerate(dict.fromkeys(self.values))}
            return [order[value] / max(len(order) - 1, 1) for value in self.values]
        sizes = [self._size(value) for value in self.values if value]
        low, span = min(sizes), max(sizes) - min(sizes) or 1.0
        foot = FOOT if len(sizes) < len(self.values) else 0.0
        return [foot + (1 - foot) * (self._size(value) - low) / span if value else 0.0 for value in self.values]

    def levels(self) -> list[int]:
        """Return the level of each value: one per distinct value, or quantile bins of many numbers."""
        distinct = sorted(set(self.values))
        most = max(2, min(MOST_LEVELS, len(self.values) // 2))
        if not self.is_number or len(distinct) <= most:
            return [distinct.index(value) for value in self.values]
        sizes = [self._size(value) for value in self.values if value]
        edges = np.quantile(sizes, np.linspace(0, 1, most + 1)[1:-1])
        return [1 + int(np.searchsorted(edges, self._size(one), side="right")) if one else 0 for one in self.values]

    def _size(self, value: str) -> float:
        return math.log(_number(value)) if self.is_log else _number(value)


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return math.nan


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Map each key to its last part if that is unique: `optimizer.lr` → `lr`."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def tick_text(text: str) -> str:
    """Format the value of an override beside an axis: as short as three significant digits permit."""
    shorter = override_value(text)
    if not NUMBER.fullmatch(text) or not 0 < abs(float(text)) < 1e-2:
        return shorter
    mantissa, exponent = f"{float(text):.2e}".split("e")
    return min(shorter, f"{float(mantissa):g}e{int(exponent)}", key=len)


def override_value(text: str) -> str:
    """Format the value of an override: a number with more digits has three significant ones."""
    if not NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        return text
    shorter = f"{float(text):.3g}".replace("e-0", "e-").replace("e+0", "e")
    return shorter if len(shorter) < len(text) and (float(shorter) != float(text) or len(text) > MOST_DIGITS) else text
