"""Simulated sweeps: how often one of equal settings is named the winner, and how often a real winner is found.

python -m benchmarks.simulate_sweeps
"""

from collections.abc import Callable, Sequence

import numpy as np

from gpt2lab.analysis.setting_comparison import Comparison, Runs, compare

SETTINGS, SEEDS = (2, 4, 8), (2, 3, 5)
REPETITIONS = 20_000
SEED_EFFECT = 3.0  # standard deviation of what a seed does to all settings, in standard deviations of the noise


def _normal(draws: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return draws.normal(size=shape)


def _uniform(draws: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return draws.uniform(-(3**0.5), 3**0.5, size=shape)


def _skewed(draws: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return draws.exponential(size=shape)


def _one_noisy(draws: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return draws.normal(size=shape) * np.r_[10.0, np.ones(shape[0] - 1)][:, None]


NOISE = {"normal": _normal, "uniform": _uniform, "exponential": _skewed, "one setting 10 × as noisy": _one_noisy}


def lower_wins(runs: Runs) -> Comparison:
    """The project's rule, for losses."""
    return compare(runs, lower_is_better=True)


def simulated(
    means: Sequence[float],
    seeds: int,
    repetitions: int,
    noise: str = "normal",
    rule: Callable[[Runs], Comparison] = lower_wins,
) -> list[Comparison]:
    """What is said of as many sweeps, the same ones in every call.

    Args:
        means: losses of the settings "0", "1", …, in standard deviations of the noise.
    """
    draws = np.random.default_rng(1)
    found = []
    for _ in range(repetitions):
        of_seeds = SEED_EFFECT * draws.normal(size=(1, seeds))
        losses = np.array(means)[:, None] + of_seeds + NOISE[noise](draws, (len(means), seeds))
        runs = {str(k): [(str(s), float(loss)) for s, loss in enumerate(row)] for k, row in enumerate(losses)}
        found.append(rule(runs))
    return found


def share_with_winner(found: Sequence[Comparison]) -> float:
    """In how many of the sweeps a winner is named."""
    return sum(comparison.winner is not None for comparison in found) / len(found)


def share_found(found: Sequence[Comparison], best: str) -> float:
    """In how many of the sweeps this setting is named the winner."""
    return sum(comparison.winner == best for comparison in found) / len(found)


def share_wrong(found: Sequence[Comparison], means: Sequence[float]) -> float:
    """In how many of the sweeps a setting is said to be worse than one that is no better."""

    def is_wrong(comparison: Comparison) -> bool:
        best = means[int(comparison.alike[0])]
        return any(means[int(setting)] <= best for setting in set(comparison.order) - set(comparison.alike))

    return sum(map(is_wrong, found)) / len(found)


def main() -> None:
    """Print the three tables, in percent of the sweeps."""
    cells = [(settings, seeds) for settings in SETTINGS for seeds in SEEDS]
    print("All settings alike: a winner is named\n" + _line("", [f"{k}×{n}" for k, n in cells]))
    for noise in NOISE:
        null = [share_with_winner(simulated([0.0] * k, n, REPETITIONS, noise)) for k, n in cells]
        print(_line(noise, [f"{100 * share:.1f}" for share in null]))
    print("Half of the settings alike, the rest worse: a setting is called worse that is not")
    for worse in (1.0, 2.0, 4.0, 8.0, 30.0):
        mixed = [([0.0] * max(2, k // 2) + [worse] * (k - max(2, k // 2)), n) for k, n in cells]
        shares = [share_wrong(simulated(means, n, REPETITIONS), means) for means, n in mixed]
        print(_line(f"by {worse:g} standard deviations", [f"{100 * share:.1f}" for share in shares]))
    print("One setting better than all others: it is named the winner")
    for better in (1.0, 2.0, 4.0, 8.0):
        shares = [share_found(simulated([0.0] + [better] * (k - 1), n, REPETITIONS), "0") for k, n in cells]
        print(_line(f"by {better:g} standard deviations", [f"{100 * share:.1f}" for share in shares]))


def _line(name: str, values: Sequence[str]) -> str:
    return f"  {name:<28}" + "".join(f"{value:>7}" for value in values)


if __name__ == "__main__":
    main()
