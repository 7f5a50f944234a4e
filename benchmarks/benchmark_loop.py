"""Time of train.py beside its steps: loop, start, and a checkpoint every 100 steps.

    python -m benchmarks.benchmark_loop [--rounds 5] [--every 100]

- Loop: seconds of a step of train.py with its default callbacks over those of a bare loop over the same model, loss and
  optimizer (benchmark_cpu_step.py).
- Start: seconds from the start of the process to the end of the first step, beside a process that only imports torch,
  lightning and transformers. The data are prepared before.
- Checkpoints: seconds of training with one every 100 steps over those without, both until the last step is over.

Programs alternate in new processes; ratios are of medians over rounds. Prints Markdown tables.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.benchmark_cpu_step import measure_apart
from benchmarks.profile_step import STEP_TIMES
from benchmarks.shape import BATCH, CONTEXT
from benchmarks.synthetic_corpus import write_corpus, write_tokenizer
from benchmarks.train_command import bin_data, seconds_of_steps, train

VOCABULARY = 4_096
IMPORTS = "import torch, lightning, transformers"
CHECKPOINTS = {"nano": 40, "mini": 4}
FIRST_STEP = "+callbacks.first_step._target_=benchmarks.step_times.FirstStep"


def run(folder: Path, model: str, steps: int, *keys: str) -> tuple[Path, dict[str, Any]]:
    """Train and return (run directory, report); `folder` holds the corpus and receives the run."""
    arguments = [f"model={model}", *bin_data(folder / "corpus", folder / "tokenizer"), "optimizer=adamw"]
    arguments += [f"context={CONTEXT}", f"batch_tokens={BATCH * CONTEXT}", f"micro_batch={BATCH}", "precision=bf16"]
    arguments += [f"validate_every={steps}", f"sample_every={steps}", "callbacks.checkpoint.verify_export=false"]
    arguments += [f"steps={steps}", "callbacks.final_score=null", "devices=1", "schedule.warmup_steps=0"]
    arguments += [f"checkpoint_every={steps}"]  # the last one of a key counts
    run_dir = Path(tempfile.mkdtemp(dir=folder)) / "run"
    return run_dir, train(run_dir, [*arguments, *keys])


def loop_seconds(folder: Path) -> dict[str, float]:
    """Measure the seconds of a step of a bare loop and of train.py."""
    bare = measure_apart(VOCABULARY, "reuse")["milliseconds"] / 1e3
    run_dir, _ = run(folder, "mini", 60, "compile=auto", STEP_TIMES, "log_every=1")
    times = json.loads((run_dir / "step_times.json").read_text())
    return {"a bare loop": bare, "train.py": times["step"] / 1e3}


def start_seconds(folder: Path) -> dict[str, float]:
    """Measure the seconds of the imports alone, and from the start of train.py to the end of its first step."""
    started = time.time()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    imports, started = time.time() - started, time.time()
    run_dir, _ = run(folder, "nano", 1, FIRST_STEP)
    first = json.loads((run_dir / "first_step.json").read_text())
    return {"imports of torch, lightning and transformers": imports, "train.py, first step": first["time"] - started}


def checkpoint_seconds(folder: Path, model: str, every: int) -> dict[str, float]:
    """Measure the seconds of all steps, and of what interrupts them, without and with checkpoints."""
    found, steps = {}, CHECKPOINTS[model] * every
    for name, interval in (("no checkpoints", steps), (f"one every {every} steps", every)):
        _, report = run(folder, model, steps, f"checkpoint_every={interval}")
        found[name] = seconds_of_steps(report)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--every", type=int, default=100, help="steps between two checkpoints")
    options = parser.parse_args()
    print("| | seconds | ÷ the first | beyond the first, s |\n|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus", VOCABULARY)
        write_tokenizer(folder / "tokenizer", VOCABULARY)
        run(folder, "nano", 1)  # fills the caches
        measured: dict[str, Callable[[Path], dict[str, float]]] = {
            "a step of mini": loop_seconds,
            "until the first step of nano": start_seconds,
        }
        for model, number in CHECKPOINTS.items():
            title = f"{number * options.every:,} steps of {model}"
            measured[title] = partial(checkpoint_seconds, model=model, every=options.every)
        for title, measure in measured.items():
            found = defaultdict(list)
            for _ in range(options.rounds):
                for program, seconds in measure(folder).items():
                    found[program].append(seconds)
            medians = {program: statistics.median(values) for program, values in found.items()}
            first = next(iter(medians.values()))
            for program, seconds in medians.items():
                row = f"{title}: {program} | {seconds:.3f} | {seconds / first:.3f} | {seconds - first:+.2f}"
                print(f"| {row} |", flush=True)


if __name__ == "__main__":
    main()
