"""Sampled softmax compared with the full softmax: training speed of model mini with a vocabulary of 50,257.

    python -m benchmarks.benchmark_sampled_softmax

T = 256, 2,048 tokens per step, bf16, AdamW. Sides alternate; values are medians over rounds. Prints a table.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.alternation import alternate, medians
from benchmarks.benchmark_training_step import ours
from benchmarks.synthetic_corpus import write_data

VOCABULARY = 50_257
WHOLE = "clm, all 50,257 tokens"
SIDES = {WHOLE: ["objective=clm"]} | {
    f"sampled_softmax, {count:,} negatives": ["objective=sampled_softmax", f"objective.negatives={count}"]
    for count in (1_024, 4_096, 16_384)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)  # minimum for which the full head is compiled
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = write_data(folder := Path(scratch), VOCABULARY)
        sides = {name: partial(ours, folder, options.steps, [*data, *keys]) for name, keys in SIDES.items()}
        speeds = medians(alternate(sides, options.rounds))
    print("| objective | tokens/s | ÷ full softmax |\n|---|--:|--:|")
    for name, speed in speeds.items():
        print(f"| {name} | {speed:,.0f} | {speed / speeds[WHOLE]:.2f} |")


if __name__ == "__main__":
    main()
