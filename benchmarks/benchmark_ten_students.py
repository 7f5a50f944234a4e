"""Ten students of one teacher on the same batches: online teacher compared with a cached one.

    python -m benchmarks.benchmark_ten_students

Student 4 layers, width 256; teacher 8 layers, width 512; random weights and tokens, vocabulary of 4,096; 2,048 targets
per step; ten learning rates as a sweep of train.py on the CPU. Values are wall times of the command, including process
start, validation and export, and with a cached teacher the filling of a new cache. Sides alternate. Prints a Markdown
table.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.alternation import alternate, medians
from benchmarks.benchmark_distill import FULL, TINY, Sizes, write_inputs
from benchmarks.train_command import new_run_dir, run_train

STEPS = 200
ONLINE, CACHED = "online teacher", "cached teacher: 12 samples per token"
KEYS = {ONLINE: ["teacher_cache=none"], CACHED: ["teacher_cache=sampled"]}


def sweep(folder: Path, sizes: Sizes, students: int, keys: list[str]) -> float:
    """Run one sweep into a new folder in `folder` and return the seconds; raises as `run_train`."""
    sweep_dir = new_run_dir(folder)
    rates = ",".join(f"{(number + 1) * 2e-4:.1e}" for number in range(students))
    words = ["task=distill", f"teacher={folder / 'teacher'}", "preflight=off", f"optimizer.lr={rates}", *sizes.keys]
    words += ["logger=none", "callbacks=minimal", "loss=forward_kl", *keys]
    words += [f"cache_dir={sweep_dir.parent / 'cache'}", f"hydra.sweep.dir={sweep_dir}"]
    start = time.perf_counter()
    run_train(["-m", *words])
    return time.perf_counter() - start


def measure(sizes: Sizes, vocab_size: int, students: int) -> dict[str, float]:
    """Return median seconds over the rounds by side."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, one_epoch = Path(scratch), sizes.targets * sizes.steps + sizes.context + 1
        data = write_inputs(folder, sizes.teacher, vocab_size, one_epoch)
        sides = {side: partial(sweep, folder, sizes, students, [*data, *keys]) for side, keys in KEYS.items()}
        return medians(alternate(sides, sizes.rounds))


def markdown(seconds: dict[str, float], students: int) -> str:
    """Format a table with a row per side."""
    head = [f"| {students} students | s | ÷ online teacher |", "|---|--:|--:|"]
    return "\n".join(
        [*head, *(f"| {side} | {own:.0f} | {own / seconds[ONLINE]:.2f} |" for side, own in seconds.items())]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tiny", action="store_true", help="takes seconds; results are meaningless")
    options = parser.parse_args()
    sizes = TINY if options.tiny else replace(FULL, rounds=options.rounds, steps=options.steps)
    students = 2 if options.tiny else 10
    print(markdown(measure(sizes, min(sizes.vocabularies), students), students))


if __name__ == "__main__":
    main()
