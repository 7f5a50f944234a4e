"""Time of train.py beside its steps: loop, start, and a checkpoint every 100 steps.

    python -m benchmarks.benchmark_loop [--parts loop start checkpoints] [--rounds 5] [--every 100]

- Loop: seconds of a step of train.py with its default callbacks over those of a bare loop over the same model, loss and
  optimizer (benchmark_cpu_step.py).
- Start: seconds from the start of the process to the end of the first step, beside a process that only imports torch,
  lightning and transformers. The data are prepared before.
- Checkpoints: seconds of training with one every 100 steps over those without, both until the last step is over.

The two programs of the loop, and of the checkpoints, run at once on half of the cores each and exchange them every
round; those of the start alternate. Values are medians over rounds, ratios with the smallest and largest of a round.
Prints a Markdown table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.alternation import alternate, run_pairs, spread
from benchmarks.benchmark_cpu_step import measure_apart
from benchmarks.shape import BATCH, CONTEXT
from benchmarks.synthetic_corpus import write_data
from benchmarks.train_command import new_run_dir, of_length, seconds_of_steps, train, train_timed

VOCABULARY = 4_096
IMPORTS = "import torch, lightning, transformers"
CHECKPOINTS = {"nano": 10, "mini": 2}
PARTS = ("loop", "start", "checkpoints")
FIRST_STEP = "+callbacks.first_step._target_=benchmarks.step_times.FirstStep"

Sides = dict[str, Callable[[], float]]  # return seconds


def arguments(data: list[str], model: str, steps: int) -> list[str]:
    """Return the arguments of train.py; `data` are those of the corpus."""
    words = [f"model={model}", *data, *of_length(steps), f"sample_every={steps}", "optimizer=adamw"]
    words += [f"context={CONTEXT}", f"batch_tokens={BATCH * CONTEXT}", f"micro_batch={BATCH}", "precision=bf16"]
    words += ["schedule.warmup_steps=0", "devices=1"]
    return [*words, "callbacks.checkpoint.verify_export=false", "callbacks.final_score=null"]


def loops(folder: Path, data: list[str]) -> Sides:
    """Return sides that measure a step of a bare loop and of train.py."""

    def bare() -> float:
        return measure_apart(VOCABULARY, "reuse gelu")["milliseconds"] / 1e3

    def ours() -> float:
        _, times = train_timed(folder, [*arguments(data, "mini", 60), "compile=auto", "log_every=1"])
        return times["step"] / 1e3

    return {"a bare loop": bare, "train.py": ours}


def starts(folder: Path, data: list[str]) -> Sides:
    """Return sides that measure the imports alone, and the time until the end of the first step of train.py."""

    def imports() -> float:
        started = time.time()
        subprocess.run([sys.executable, "-c", IMPORTS], check=True)
        return time.time() - started

    def first_step() -> float:
        run_dir, started = new_run_dir(folder), time.time()
        train(run_dir, [*arguments(data, "nano", 1), FIRST_STEP])
        return json.loads((run_dir / "first_step.json").read_text())["time"] - started

    return {"imports of torch, lightning and transformers": imports, "train.py, first step": first_step}


def checkpoints(folder: Path, data: list[str], model: str, every: int) -> Sides:
    """Return sides that measure all steps and what interrupts them, without and with checkpoints."""
    steps = CHECKPOINTS[model] * every

    def measure(interval: int) -> float:
        keys = [*arguments(data, model, steps), f"checkpoint_every={interval}"]  # the last one of a key counts
        return seconds_of_steps(train(new_run_dir(folder), keys))

    return {"no checkpoints": partial(measure, steps), f"one every {every} steps": partial(measure, every)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--every", type=int, default=100, help="steps between two checkpoints")
    options = parser.parse_args()
    print("| | | seconds | ÷ the first | beyond the first, s |\n|---|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder, VOCABULARY)
        train(new_run_dir(folder), arguments(data, "nano", 1))  # fills the caches
        if "loop" in options.parts:
            print_rows("a step of mini", run_pairs(loops(folder, data), options.rounds))
        if "start" in options.parts:
            print_rows("until the first step of nano", alternate(starts(folder, data), options.rounds))
        for model, number in CHECKPOINTS.items() if "checkpoints" in options.parts else ():
            sides = checkpoints(folder, data, model, options.every)
            print_rows(f"{number * options.every:,} steps of {model}", run_pairs(sides, options.rounds))


def print_rows(title: str, found: dict[str, list[float]]) -> None:
    """Print a row for each program, with its seconds in each round, beside the first."""
    first = next(iter(found.values()))
    for program, seconds in found.items():
        ratios = spread([one / other for one, other in zip(seconds, first, strict=True)], ".3f")
        beyond = statistics.median(seconds) - statistics.median(first)
        print(f"| {title} | {program} | {statistics.median(seconds):.3f} | {ratios} | {beyond:+.2f} |", flush=True)


if __name__ == "__main__":
    main()
