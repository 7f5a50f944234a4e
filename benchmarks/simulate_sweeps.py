"""Simulated sweeps: how often one of equal settings is called the winner, and how often a real winner is found.

python -m benchmarks.simulate_sweeps
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np

from gpt2lab.analysis.setting_comparison import Comparison, Runs, compare

SETTINGS, SEEDS = (2, 4, 8), (2, 3, 5)
REPETITIONS = 20_000
SEED_EFFECT = 3.0  # standard deviation of the seed effect, in standard deviations of the noise


def _normal(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return random.normal(size=shape)


def _uniform(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return random.uniform(-(3**0.5), 3**0.5, size=shape)


def _skewed(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return random.exponential(size=shape)


def _one_noisy(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return random.normal(size=shape) * np.r_[10.0, np.ones(shape[0] - 1)][:, None]


NOISE = {"normal": _normal, "uniform": _uniform, "exponential": _skewed, "one setting 10 × as noisy": _one_noisy}


def lower_wins(runs: Runs) -> Comparison:
    """Compare settings by loss with the project's rule."""
    return compare(runs, lower_is_better=True)


def simulate(
    means: Sequence[float],
    seeds: int,
    repetitions: int,
    noise: str = "normal",
    rule: Callable[[Runs], Comparison] = lower_wins,
) -> list[Comparison]:
    """Simulate sweeps, the same ones in every call, and return their comparisons.

    Args:
        means: losses of the settings "0", "1", …, in standard deviations of the noise.
    """
    random = np.random.default_rng(1)
    found = []
    for _ in range(repetitions):
        seed_effects = SEED_EFFECT * random.normal(size=(1, seeds))
        losses = np.array(means)[:, None] + seed_effects + NOISE[noise](random, (len(means), seeds))
        runs = {str(k): [(str(s), float(loss)) for s, loss in enumerate(row)] for k, row in enumerate(losses)}
        found.append(rule(runs))
    return found


def share_with_winner(found: Sequence[Comparison]) -> float:
    """Share of the sweeps with a winner."""
    return sum(comparison.winner is not None for comparison in found) / len(found)


def share_found(found: Sequence[Comparison], best: str) -> float:
    """Share of the sweeps in which this setting is the winner."""
    return sum(comparison.winner == best for comparison in found) / len(found)


def share_wrong(found: Sequence[Comparison], means: Sequence[float]) -> float:
    """Share of the sweeps in which a setting is called worse than one that is not better."""

    def is_wrong(comparison: Comparison) -> bool:
        best = means[int(comparison.ties[0])]
        return any(means[int(setting)] <= best for setting in set(comparison.order) - set(comparison.ties))

    return sum(map(is_wrong, found)) / len(found)


def main() -> None:
    """Print the three tables, in percent of the sweeps."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    cells = [(settings, seeds) for settings in SETTINGS for seeds in SEEDS]
    print("All settings alike: a winner is named\n" + _line("", [f"{k}×{n}" for k, n in cells]))
    for noise in NOISE:
        null = [share_with_winner(simulate([0.0] * k, n, REPETITIONS, noise)) for k, n in cells]
        print(_line(noise, [f"{100 * share:.1f}" for share in null]))
    print("Half of the settings alike, the rest worse: a setting is called worse that is not")
    for worse in (1.0, 2.0, 4.0, 8.0, 30.0):
        mixed = [([0.0] * max(2, k // 2) + [worse] * (k - max(2, k // 2)), n) for k, n in cells]
        shares = [share_wrong(simulate(means, n, REPETITIONS), means) for means, n in mixed]
        print(_line(f"by {worse:g} standard deviations", [f"{100 * share:.1f}" for share in shares]))
    print("One setting better than all others: it is named the winner")
    for better in (1.0, 2.0, 4.0, 8.0):
        shares = [share_found(simulate([0.0] + [better] * (k - 1), n, REPETITIONS), "0") for k, n in cells]
        print(_line(f"by {better:g} standard deviations", [f"{100 * share:.1f}" for share in shares]))


def _line(name: str, values: Sequence[str]) -> str:
    return f"  {name:<28}" + "".join(f"{value:>7}" for value in values)


if __name__ == "__main__":
    main()
