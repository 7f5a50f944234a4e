"""Sampled softmax compared with the full softmax: training speed of model mini with a vocabulary of 50,257.

    python -m benchmarks.benchmark_sampled_softmax

T = 256, 2,048 tokens per step, bf16, AdamW. Sides alternate; values are medians over rounds. Prints a table.
"""

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from benchmarks.benchmark_training_step import ours
from benchmarks.synthetic_corpus import write_corpus, write_tokenizer

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
    speeds = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        corpus, tokenizer = Path(scratch) / "corpus", Path(scratch) / "tokenizer"
        write_corpus(corpus, VOCABULARY)
        write_tokenizer(tokenizer, VOCABULARY)
        for number in range(options.rounds):
            for place, (name, keys) in enumerate(SIDES.items()):
                run_dir = Path(scratch) / f"run-{number}-{place}"
                speeds[name].append(ours(corpus, tokenizer, run_dir, options.steps, keys))
                print(f"{name}: {speeds[name][-1]:,.0f} tokens/s", file=sys.stderr)
    medians = {name: statistics.median(several) for name, several in speeds.items()}
    print("| objective | tokens/s | ÷ full softmax |\n|---|--:|--:|")
    for name, speed in medians.items():
        print(f"| {name} | {speed:,.0f} | {speed / medians[WHOLE]:.2f} |")


if __name__ == "__main__":
    main()
