"""Sampled softmax beside the whole one: training speed of model mini at 50,257 entries, through train.py.

    python -m benchmarks.benchmark_sampled_softmax

T = 256, 2,048 tokens a step, AdamW. The sides take turns; a figure is the median over rounds. Prints a Markdown table.
"""

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from benchmarks.shape import BATCH, CONTEXT
from benchmarks.synthetic_corpus import write_corpus, write_tokenizer
from benchmarks.train_command import bin_data, train

VOCABULARY = 50_257
WHOLE = "clm, all 50,257 entries"
SIDES = {WHOLE: ["objective=clm"]} | {
    f"sampled_softmax, {count:,} negatives": ["objective=sampled_softmax", f"objective.negatives={count}"]
    for count in (1_024, 4_096, 16_384)
}


def tokens_per_second(run_dir: Path, corpus: Path, tokenizer: Path, keys: list[str], steps: int) -> float:
    """As report.json has it: whole steps, data and logging included, validation not."""
    arguments = [*keys, "task=pretrain", "model=mini", *bin_data(corpus, tokenizer), "optimizer=adamw"]
    arguments += [f"context={CONTEXT}", f"batch_tokens={BATCH * CONTEXT}", f"micro_batch={BATCH}", f"steps={steps}"]
    arguments += [f"validate_every={steps}", f"checkpoint_every={steps}", f"sample_every={steps}", "log_every=5"]
    arguments += ["logger=csv", "devices=1", "callbacks.checkpoint.verify_export=false"]
    return train(run_dir, arguments)["tokens_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)  # from so many on the whole head's work is compiled
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
                speeds[name].append(tokens_per_second(run_dir, corpus, tokenizer, keys, options.steps))
                print(f"{name}: {speeds[name][-1]:,.0f} tokens/s", file=sys.stderr)
    medians = {name: statistics.median(several) for name, several in speeds.items()}
    print("| objective | tokens/s | ÷ the whole softmax |\n|---|--:|--:|")
    for name, speed in medians.items():
        print(f"| {name} | {speed:,.0f} | {speed / medians[WHOLE]:.2f} |")


if __name__ == "__main__":
    main()
