"""Alternation: the sides of a comparison run in turn, or two at once, so that a slow minute affects all of them."""

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tqdm import tqdm

from launch.config.machine import usable_cores

Key = TypeVar("Key")
Found = TypeVar("Found")
Record = TypeVar("Record", bound=Any)


def alternate(sides: Mapping[Key, Callable[[], Found]], rounds: int) -> dict[Key, list[Found]]:
    """Return the result of each round by side, and print it on stderr as soon as it is known."""
    found: dict[Key, list[Found]] = {side: [] for side in sides}
    for side in tqdm(list(sides) * rounds, "measurements", disable=None):
        found[side].append(sides[side]())
        tqdm.write(f"{side}: {found[side][-1]}", file=sys.stderr)
    return found


def run_pairs(sides: Mapping[Key, Callable[[], float]], rounds: int) -> dict[Key, list[float]]:
    """Return the result of each round of two sides, whose processes run at once on half of the cores each.

    They exchange their cores every round. For differences of a few percent, less than the speed of a shared machine
    varies from minute to minute.

    Raises:
        RuntimeError: this process may use one core only, or the system does not set cores (Linux does).
    """
    cores = usable_cores()
    if len(cores) < 2 or not sys.platform.startswith("linux"):
        raise RuntimeError(f"{len(cores)} cores on {sys.platform}: two sides at once need Linux and two cores.")
    halves = [cores[: len(cores) // 2], cores[len(cores) // 2 :]]

    def run(side: Key, own: list[int]) -> float:
        os.sched_setaffinity(0, own)  # of this thread, and of the processes that it starts
        return sides[side]()

    found: dict[Key, list[float]] = {side: [] for side in sides}
    for number in tqdm(range(rounds), "rounds", disable=None):
        own = halves if number % 2 else halves[::-1]
        with ThreadPoolExecutor(2) as threads:
            pending = {side: threads.submit(run, side, half) for side, half in zip(sides, own, strict=True)}
        for side, future in pending.items():
            found[side].append(future.result())
            tqdm.write(f"{side}: {found[side][-1]}", file=sys.stderr)
    return found


def medians(found: Mapping[Key, Sequence[float]]) -> dict[Key, float]:
    """Return the median over the rounds by side."""
    return {side: statistics.median(values) for side, values in found.items()}


def median_records(found: Mapping[Key, Sequence[Record]]) -> dict[Key, Record]:
    """Return the median of each field over the rounds by side; the records are dataclasses of numbers."""
    return {
        side: type(records[0])(*map(statistics.median, zip(*(vars(one).values() for one in records), strict=True)))
        for side, records in found.items()
    }


def alternate_speeds(
    sides: Mapping[str, Callable[[], Found]], rounds: int, tokens: Callable[[Found], int]
) -> tuple[dict[str, list[float]], dict[str, Found]]:
    """Return (tokens per second of each round, result of the last round) by side.

    The first round is warm-up, and every second round runs the sides in reverse.

    Args:
        tokens: the number of tokens of a result.
    """
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, Found] = {}
    for number in range(rounds + 1):
        for name in list(sides) if number % 2 else reversed(list(sides)):
            started = time.perf_counter()
            found[name] = sides[name]()
            seconds = time.perf_counter() - started
            if number:
                speeds[name].append(tokens(found[name]) / seconds)
    return speeds, found


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Format the median with the smallest and the largest value."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def beside_fastest(speeds: Mapping[str, list[float]], ours: str) -> tuple[str, list[str]]:
    """Return (name of the fastest other side, cells with its speed, ours and the ratio in each round)."""
    fastest = max((name for name in speeds if name != ours), key=lambda name: statistics.median(speeds[name]))
    ratios = [one / other for other, one in zip(speeds[fastest], speeds[ours], strict=True)]
    return fastest, [spread(speeds[fastest], ",.0f"), spread(speeds[ours], ",.0f"), spread(ratios)]
