"""Weak scaling from one CPU process to two, with ddp and fsdp and equal tokens per process; and waiting for data.

    python -m benchmarks.benchmark_scaling

Model micro on the standard library, 2,048 tokens per step and one thread per process. Each measurement is a run of
train.py, sides alternate, and values are medians over rounds. Waiting for data is the time between batches, on rank 0.
Prints a Markdown table.
"""

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.alternation import alternate, median_records
from benchmarks.train_command import of_length, tiny_run, train_timed
from launch.run.auto_settings import cpu_cores

SIDES = ((1, "auto"), (2, "ddp"), (2, "fsdp"))  # processes, strategy
TOKENS = 2_048  # a step and process


@dataclass(frozen=True)
class Measured:
    """Result of one run."""

    speed: float  # tokens per second of all processes together
    waiting: float  # share of a step


def measure_run(folder: Path, processes: int, strategy: str, steps: int, keys: list[str]) -> Measured:
    """Measure one run into a new folder in `folder`."""
    words = [f"devices={processes}", f"strategy={strategy}", f"batch_tokens={processes * TOKENS}", "threads=1"]
    words += ["accelerator=cpu", "logger=none", "callbacks=minimal", "log_every=5", *of_length(steps)]
    report, times = train_timed(folder, [*words, *keys])
    return Measured(report["tokens_per_second"], times["data"] / times["step"])


def measure(rounds: int, steps: int, keys: list[str]) -> dict[tuple[int, str], Measured]:
    """Return medians over the rounds by side."""
    with tempfile.TemporaryDirectory() as scratch:
        sides = {side: partial(measure_run, Path(scratch), *side, steps, keys) for side in SIDES}
        return median_records(alternate(sides, rounds))


def markdown(found: dict[tuple[int, str], Measured]) -> str:
    """Format a table with a row per side; perfect scaling is the number of processes times the speed of one."""
    alone = found[SIDES[0]].speed
    rows = ["| processes | strategy | tokens/s | ÷ one process | of perfect scaling | step waits for data |"]
    rows += ["|--:|---|--:|--:|--:|--:|"]
    for (processes, strategy), own in found.items():
        ratio = own.speed / alone
        name = strategy if processes > 1 else "–"
        rows.append(
            f"| {processes} | {name} | {own.speed:,.0f} | {ratio:.2f} | {ratio / processes:.0%} | {own.waiting:.2%} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tiny", action="store_true", help="takes seconds; results are meaningless")
    options = parser.parse_args()
    if cpu_cores() < max(processes for processes, _ in SIDES):
        raise SystemExit("Needs as many cores as processes.")
    if options.tiny:
        print(markdown(measure(1, 15, tiny_run())))
    else:
        print(markdown(measure(options.rounds, options.steps, ["model=micro"])))


if __name__ == "__main__":
    main()
