"""Sweep of short jobs in parallel, compared with sequential calls of train.py.

    python -m benchmarks.benchmark_sweep_overhead

Eight seeds of nano on the standard library, 20 steps each, on two cores to which all processes are bound. Values are
wall times of the commands including process start, validation, checkpoint and export; medians over rounds with
alternating sides. Prints a Markdown table.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.alternation import alternate, medians
from benchmarks.train_command import new_run_dir, run_train, tiny_run
from launch.config.machine import usable_cores

CORES = 2
SEPARATE, SWEEP = "separate calls of train.py", f"one sweep, n_jobs={CORES}"


def run_all(commands: list[list[str]]) -> float:
    """Run train.py with each of these arguments sequentially and return the seconds; raises as `run_train`."""
    start = time.perf_counter()
    for arguments in commands:
        run_train(arguments)
    return time.perf_counter() - start


def sides(folder: Path, jobs: int, keys: list[str]) -> dict[str, Callable[[], float]]:
    """Return a function per side that runs its jobs into new folders in `folder` and returns the seconds."""
    seeds = [str(seed + 1) for seed in range(jobs)]

    def separate() -> float:
        return run_all([[*keys, f"seed={seed}", f"run_dir={new_run_dir(folder)}"] for seed in seeds])

    def sweep() -> float:
        job = [f"seed={','.join(seeds)}", f"n_jobs={CORES}", f"hydra.sweep.dir={new_run_dir(folder)}"]
        return run_all([["-m", *keys, *job]])

    return {SEPARATE: separate, SWEEP: sweep}


def measure(rounds: int, jobs: int, keys: list[str]) -> dict[str, float]:
    """Return median seconds over the rounds by side. Tokenizer and data are prepared before."""
    with tempfile.TemporaryDirectory() as scratch:
        run_train([*keys, f"run_dir={new_run_dir(Path(scratch))}"])
        return medians(alternate(sides(Path(scratch), jobs, keys), rounds))


def markdown(seconds: dict[str, float], jobs: int, steps: int) -> str:
    """Format a table with a row per side."""
    head = [f"| {jobs} jobs of {steps} steps, {CORES} cores | s | ÷ separate calls |", "|---|--:|--:|"]
    rows = [f"| {side} | {own:.1f} | {own / seconds[SEPARATE]:.2f} |" for side, own in seconds.items()]
    return "\n".join([*head, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="takes seconds; results are meaningless")
    options = parser.parse_args()
    if len(usable_cores()) < CORES:
        raise SystemExit(f"Needs {CORES} cores.")
    os.sched_setaffinity(0, usable_cores()[:CORES])
    keys = [*(tiny_run() if options.tiny else ["model=nano"]), "logger=none", "accelerator=cpu"]
    keys.append(f"steps={options.steps}")
    print(markdown(measure(options.rounds, options.jobs, keys), options.jobs, options.steps))


if __name__ == "__main__":
    main()
