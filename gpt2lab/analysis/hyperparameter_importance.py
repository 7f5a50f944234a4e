"""Hyperparameter importance: how much of the differences between settings each varied key explains by itself.

One-way analysis of variance for each key: the share of the variance that lies between its values, less what chance
would give as many values (the adjusted R²). It asks nothing of the sweep's shape, and where a key does nothing it says
so. In a grid the rest to 1 is chance, and what keys do only together. What counts is settings, not runs: the same
setting at another seed says nothing new about a key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gpt2lab.analysis.sweep_axes import VariedKey

FEWEST_SETTINGS = 4
CHANCE = 0.05  # how often a key that does nothing is said to matter


@dataclass(frozen=True)
class Importance:
    """What one key explains.

    Attributes:
        share: of the variance, 0 to 1.
        is_shown: whether a key that does nothing would rarely seem to explain as much.
    """

    key: str
    share: float
    is_shown: bool


def importances(keys: Mapping[str, Sequence[str]], results: Sequence[float]) -> list[Importance]:
    """The keys' shares, the largest first; empty where there are too few settings, or no differences, to say.

    Args:
        keys: the values of each varied key, by setting.
        results: the watched metric of each setting, the mean over its seeds, finite.
    """
    values = np.array(results)  # (settings,)
    if len(values) < FEWEST_SETTINGS or np.ptp(values) == 0:
        return []
    found = [_importance(key, np.array(VariedKey(told).levels()), values) for key, told in keys.items()]
    return sorted((one for one in found if one is not None), key=lambda one: -one.share)


def _importance(key: str, levels: np.ndarray, values: np.ndarray) -> Importance | None:
    """None where the key has one value, or another one in each setting."""
    from scipy.stats import f as distribution  # a second to import, which training need not wait for

    groups = [values[levels == level] for level in np.unique(levels)]
    between, within = len(groups) - 1, len(values) - len(groups)
    if not between or not within:
        return None
    inside = sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / within
    total = float(values.var(ddof=1))
    explained = (total * (len(values) - 1) - inside * within) / between
    by_chance = float(distribution.sf(explained / inside, between, within)) if inside else 0.0
    return Importance(key, max(0.0, 1 - inside / total), by_chance < CHANCE)
