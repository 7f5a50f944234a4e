"""Hyperparameter importance: share of the variance between settings that each varied key explains.

One-way analysis of variance for each key: adjusted R² of its values. Any shape of sweep is allowed. In a grid the rest
to 1 is noise and interactions between keys. The observations are settings, not runs: another seed of the same setting
adds no information about a key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gpt2lab.analysis.sweep_axes import VariedKey

FEWEST_SETTINGS = 4
SIGNIFICANCE = 0.05  # probability that a key without effect is reported as significant


@dataclass(frozen=True)
class Importance:
    """Importance of one key.

    Attributes:
        share: share of the variance, 0 to 1.
        is_significant: whether a key without effect rarely has such a share.
    """

    key: str
    share: float
    is_significant: bool


def importances(keys: Mapping[str, Sequence[str]], results: Sequence[float]) -> list[Importance]:
    """Return the importance of each key, the largest first; empty with too few settings or no differences.

    Args:
        keys: values of each varied key, one per setting.
        results: watched metric of each setting, mean over its seeds, finite.
    """
    values = np.array(results)  # (settings,)
    if len(values) < FEWEST_SETTINGS or np.ptp(values) == 0:
        return []
    found = [_importance(key, np.array(VariedKey(own).levels()), values) for key, own in keys.items()]
    return sorted((one for one in found if one is not None), key=lambda one: -one.share)


def _importance(key: str, levels: np.ndarray, values: np.ndarray) -> Importance | None:
    """Analyze one key; None if it has a single value, or a different one in each setting."""
    from scipy.stats import f as distribution  # takes a second to import

    groups = [values[levels == level] for level in np.unique(levels)]
    between, within = len(groups) - 1, len(values) - len(groups)
    if not between or not within:
        return None
    inside = sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / within
    total = float(values.var(ddof=1))
    explained = (total * (len(values) - 1) - inside * within) / between
    p_value = float(distribution.sf(explained / inside, between, within)) if inside else 0.0
    return Importance(key, max(0.0, 1 - inside / total), p_value < SIGNIFICANCE)
