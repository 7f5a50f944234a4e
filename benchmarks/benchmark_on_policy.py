"""On-policy distillation step of train.py, compared with TRL's DistillationTrainer and GKDTrainer.

    python -m benchmarks.benchmark_on_policy --trl-python /path/to/environment/bin/python      (make bench TRL_PYTHON=…)

In each step the student samples 64 new tokens after each of 8 prompts of 64 tokens at temperature 1 and trains on them
(λ = 1): Jensen–Shannon divergence (β = ½) to the teacher, AdamW, clipping at 1.0. Student 4 layers, width 256; teacher
8 layers, width 512; random weights and prompts, on the CPU. train.py runs in bf16; TRL in each precision and with each
cache of keys and values, with freed memory reused as in train.py. An end-of-text token ends a text early on every side,
so speeds count the tokens that were generated. Every measurement is a new process, sides alternate, and values are
medians over rounds. See docs/measurements/performance.md for TRL's environment; without it TRL is skipped. Prints a
Markdown table.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers.utils import logging as transformers_logging

from benchmarks import benchmark_distill
from benchmarks.benchmark_distill import LOSSES, NO_TRL, Sizes, measure, parse_options, trl_step, write_inputs
from benchmarks.train_command import train_timed

OURS = "train.py"
LOOPS = {"distillation": "DistillationTrainer", "gkd": "GKDTrainer"}
CACHES = ("dynamic", "static")
LOSS_ARGUMENTS, BETA = LOSSES["jsd"]
HEADING = """| vocabulary | step | ms | generated tokens/s | train.py's ÷ it |
|--:|---|--:|--:|--:|"""
# A prompt is one half of the context, generated tokens the other
FULL = replace(benchmark_distill.FULL, context=128, trl_steps=12, rounds=5)
TINY = replace(benchmark_distill.TINY, context=16)


@dataclass(frozen=True)
class Measured:
    """Time of a step and the tokens generated in it."""

    milliseconds: float
    generated: float

    @property
    def speed(self) -> float:
        """Generated tokens per second."""
        return self.generated / self.milliseconds * 1e3


Results = dict[tuple[int, str], Measured]


class Bench:
    """Files shared by all sides for one vocabulary, and a function per side."""

    def __init__(
        self, folder: Path, sizes: Sizes, vocab_size: int, trl_python: Path | None, caches: Sequence[str] = CACHES
    ) -> None:
        self.folder, self.sizes, self.trl_python, self.caches = folder, sizes, trl_python, caches
        self.data = write_inputs(folder, sizes.teacher, vocab_size)

    def sides(self) -> dict[str, Callable[[], Measured]]:
        found: dict[str, Callable[[], Measured]] = {OURS: self.ours}
        if self.trl_python is not None:
            for case in itertools.product(self.sizes.trl_loops, self.sizes.trl_precisions, self.caches):
                loop, precision, cache = case
                found[f"{LOOPS[loop]} {precision}, {cache} cache"] = partial(self.trl, self.trl_python, *case)
        return found

    def ours(self) -> Measured:
        """Measure a complete run of train.py whose student trains on its own text."""
        words = ["task=distill", f"teacher={self.folder / 'teacher'}", "preflight=off", "loss.hard_weight=0"]
        words += [*LOSS_ARGUMENTS, *self.data, *self.sizes.keys, f"micro_batch={self.sizes.batch}", "precision=bf16"]
        words += ["sequences=gkd", "sequences.lmbda=1", f"sequences.max_new_tokens={self.sizes.context // 2}"]
        words += ["logger=csv", "callbacks.checkpoint.verify_export=false", f"sample_every={self.sizes.steps}"]
        report, times = train_timed(self.folder, words)
        return Measured(times["step"], report["tokens_seen"] / report["steps"])

    def trl(self, python: Path, loop: str, precision: str, cache: str) -> Measured:
        """Measure TRL in its environment, with the same teacher."""
        given = {**self.sizes.trl_options, "loop": loop, "precision": precision, "cache": cache, "beta": BETA}
        given |= {name: self.folder / name for name in ("tokenizer", "teacher")}
        given |= dict.fromkeys(("prompt", "new"), self.sizes.context // 2)
        found = trl_step(str(python), given, ["--keep-freed-memory"], script="trl_on_policy")
        return Measured(found["milliseconds"], found["generated"])


def markdown(results: Results) -> str:
    """Format a table with the ratio of train.py's generated tokens per second to each side's."""
    rows = [HEADING]
    for (vocab_size, name), one in results.items():
        ratio = results[vocab_size, OURS].speed / one.speed
        rows.append(f"| {vocab_size:,} | {name} | {one.milliseconds:,.0f} | {one.speed:,.0f} | {ratio:.2f} |")
    return "\n".join(rows)


def best_of_trl(results: Results) -> list[str]:
    """Return for each vocabulary a line with the ratio of train.py's speed to TRL's fastest side."""
    lines = []
    for vocab_size in dict.fromkeys(vocab_size for vocab_size, _ in results):
        theirs = {name: one for (v, name), one in results.items() if v == vocab_size and name != OURS}
        fastest = max(theirs, key=lambda name: theirs[name].speed)
        ratio = results[vocab_size, OURS].speed / theirs[fastest].speed
        lines.append(f"Vocabulary {vocab_size:,}: train.py generates {ratio:.2f} × the tokens/s of {fastest}.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-caches", choices=CACHES, nargs="+", default=CACHES, help="of keys and values")
    options, sizes = parse_options(parser, FULL, TINY, LOOPS)
    transformers_logging.disable_progress_bar()
    python, caches = options.trl_python, options.trl_caches
    results = measure(sizes, lambda folder, v: Bench(folder, sizes, v, python, caches).sides())
    print(markdown(results))
    print(NO_TRL if python is None else "\n" + "\n".join(best_of_trl(results)))


if __name__ == "__main__":
    main()
