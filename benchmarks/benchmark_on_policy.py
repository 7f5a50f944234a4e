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
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers.utils import logging as transformers_logging

from benchmarks.benchmark_distill import LOSSES, TRL_PRECISIONS, trl_step, write_inputs
from benchmarks.profile_step import STEP_TIMES
from benchmarks.train_command import bin_data, train
from gpt2lab.settings import ModelShape
from launch.run.auto_settings import HEAD_COMPILE_STEPS, cpu_cores

OURS = "train.py"
LOOPS = {"distillation": "DistillationTrainer", "gkd": "GKDTrainer"}
CACHES = ("dynamic", "static")
LOSS_ARGUMENTS, BETA = LOSSES["jsd"]
HEADING = """| vocabulary | step | ms | generated tokens/s | train.py's ÷ it |
|--:|---|--:|--:|--:|"""


@dataclass(frozen=True)
class Sizes:
    """Sizes of models, batches and measurements."""

    vocabularies: tuple[int, ...]
    student: ModelShape
    teacher: ModelShape
    batch: int  # prompts
    prompt: int  # tokens
    new: int  # generated tokens of a prompt
    steps: int  # of train.py
    trl_steps: int
    rounds: int
    threads: int
    trl_loops: tuple[str, ...] = tuple(LOOPS)
    trl_precisions: tuple[str, ...] = TRL_PRECISIONS
    trl_caches: tuple[str, ...] = CACHES

    @property
    def keys(self) -> list[str]:
        """Arguments of train.py for a student on the CPU that trains on its own text."""
        student, context = self.student, self.prompt + self.new
        words = ["task=distill", "preflight=off", "loss.hard_weight=0", *LOSS_ARGUMENTS]
        words += ["sequences=gkd", "sequences.lmbda=1", f"sequences.max_new_tokens={self.new}"]
        words += ["model=micro", f"model.n_layer={student.n_layer}", f"model.n_head={student.n_head}"]
        words += [f"model.n_embd={student.n_embd}", "optimizer=adamw", f"context={context}", "precision=bf16"]
        words += [f"{key}={self.steps}" for key in ("steps", "validate_every", "checkpoint_every", "sample_every")]
        words += [f"batch_tokens={self.batch * context}", f"micro_batch={self.batch}"]
        return [*words, "accelerator=cpu", "devices=1", f"threads={self.threads}", "logger=csv"]


FULL = Sizes(
    vocabularies=(4_096, 50_257),
    student=ModelShape(n_layer=4, n_head=4, n_embd=256),
    teacher=ModelShape(n_layer=8, n_head=8, n_embd=512),
    batch=8,
    prompt=64,
    new=64,
    steps=HEAD_COMPILE_STEPS,  # minimum for which the LM head is compiled
    trl_steps=12,
    rounds=5,
    threads=cpu_cores(),
)
TINY = Sizes((300,), ModelShape(1, 1, 16), ModelShape(1, 2, 32), 2, 8, 8, steps=12, trl_steps=4, rounds=1, threads=1)


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

    def __init__(self, folder: Path, sizes: Sizes, vocab_size: int, trl_python: Path | None) -> None:
        self.folder, self.sizes, self.trl_python = folder, sizes, trl_python
        self.runs = 0
        write_inputs(folder, sizes.teacher, vocab_size, train_tokens=200_000)

    def sides(self) -> dict[str, Callable[[], Measured]]:
        found: dict[str, Callable[[], Measured]] = {OURS: self.ours}
        if self.trl_python is not None:
            sizes = self.sizes
            for loop, precision, cache in itertools.product(sizes.trl_loops, sizes.trl_precisions, sizes.trl_caches):
                found[f"{LOOPS[loop]} {precision}, {cache} cache"] = partial(self.trl, loop, precision, cache)
        return found

    def ours(self) -> Measured:
        """Measure a complete run of train.py."""
        data = bin_data(self.folder / "corpus", self.folder / "tokenizer")
        arguments = [*self.sizes.keys, *data, f"teacher={self.folder / 'teacher'}"]
        self.runs += 1
        run_dir = self.folder / f"run-{self.runs}"
        report = train(run_dir, [*arguments, STEP_TIMES, "callbacks.checkpoint.verify_export=false"])
        times = json.loads((run_dir / "step_times.json").read_text())
        return Measured(times["step"], report["tokens_seen"] / report["steps"])

    def trl(self, loop: str, precision: str, cache: str) -> Measured:
        """Measure TRL in its environment, with the same teacher."""
        sizes, student = self.sizes, self.sizes.student
        given = {"loop": loop, "precision": precision, "cache": cache, "beta": BETA}
        given |= {"tokenizer": self.folder / "tokenizer", "teacher": self.folder / "teacher"}
        given |= {"layers": student.n_layer, "heads": student.n_head, "width": student.n_embd}
        given |= {"batch": sizes.batch, "prompt": sizes.prompt, "new": sizes.new}
        given |= {"steps": sizes.trl_steps, "threads": sizes.threads}
        found = trl_step(str(self.trl_python), given, ["--keep-freed-memory"], script="trl_on_policy")
        return Measured(found["milliseconds"], found["generated"])


def measure(sizes: Sizes, trl_python: Path | None) -> Results:
    """Return medians over the rounds by (vocabulary, side)."""
    several: dict[tuple[int, str], list[Measured]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        benches = {v: Bench(Path(scratch) / str(v), sizes, v, trl_python) for v in sizes.vocabularies}
        for _ in range(sizes.rounds):
            for vocab_size, bench in benches.items():
                for name, side in bench.sides().items():
                    one = side()
                    several[vocab_size, name].append(one)
                    found = f"{one.milliseconds:.0f} ms, {one.generated:.1f} generated tokens"
                    print(f"V={vocab_size} {name}: {found}", file=sys.stderr)
    return {
        key: Measured(*(statistics.median(vars(one)[field] for one in ones) for field in ("milliseconds", "generated")))
        for key, ones in several.items()
    }


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
    parser.add_argument("--trl-python", type=Path, help="Python of an environment with TRL (default: $TRL_PYTHON)")
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--threads", type=int, default=FULL.threads)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=FULL.vocabularies)
    parser.add_argument("--trl-loops", choices=LOOPS, nargs="+", default=tuple(LOOPS))
    parser.add_argument("--trl-precisions", choices=TRL_PRECISIONS, nargs="+", default=TRL_PRECISIONS)
    parser.add_argument("--trl-caches", choices=CACHES, nargs="+", default=CACHES, help="of keys and values")
    parser.add_argument("--tiny", action="store_true", help="takes seconds; results are meaningless")
    options = parser.parse_args()
    trl_python = options.trl_python or (Path(os.environ["TRL_PYTHON"]) if os.environ.get("TRL_PYTHON") else None)
    if trl_python is not None and not trl_python.is_file():
        parser.error(f"--trl-python {trl_python}: no such file")
    full = replace(FULL, vocabularies=tuple(options.vocabularies), rounds=options.rounds, threads=options.threads)
    sizes = TINY if options.tiny else full
    sizes = replace(sizes, trl_loops=tuple(options.trl_loops), trl_precisions=tuple(options.trl_precisions))
    sizes = replace(sizes, trl_caches=tuple(options.trl_caches))
    transformers_logging.disable_progress_bar()
    # Absolute but not resolved: Python finds its environment through the symlink.
    results = measure(sizes, trl_python.absolute() if trl_python else None)
    print(markdown(results))
    if trl_python is None:
        print("\nWithout --trl-python there is no comparison with TRL; see docs/measurements/performance.md.")
    else:
        print("\n" + "\n".join(best_of_trl(results)))


if __name__ == "__main__":
    main()
