"""Distillation step of train.py, compared with TRL's, a cached teacher, and cross-entropy only.

    python -m benchmarks.benchmark_distill --trl-python /path/to/environment/bin/python        (make bench TRL_PYTHON=…)

Student 4 layers, width 256; teacher 8 layers, width 512; random weights and tokens; T = 256, 2,048 targets per step,
AdamW, on the CPU. Every measurement is a new process, sides alternate, and values are medians over rounds. See
docs/measurements/performance.md for TRL's environment; without it TRL is skipped. Prints a Markdown table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.profile_step import STEP_TIMES
from benchmarks.shape import BATCH, CONTEXT
from benchmarks.synthetic_corpus import write_corpus, write_tokenizer
from benchmarks.train_command import ROOT, bin_data, train
from gpt2lab.model.backbone import Backbone, to_hf
from gpt2lab.settings import ModelShape
from launch.run.auto_settings import HEAD_COMPILE_STEPS, cpu_cores

STEP_MEMORY = "+callbacks.step_memory._target_=benchmarks.step_times.StepMemory"
# Loss → arguments of train.py, and the beta by which GKDTrainer knows it
LOSSES = {
    "jsd": (["loss=jsd", "loss.beta=0.5"], 0.5),
    "forward_kl": (["loss=forward_kl"], 0.0),
    "reverse_kl": (["loss=reverse_kl"], 1.0),
}
DISTILLATION, CROSS_ENTROPY = "train.py, distillation", "train.py, cross-entropy alone"
CACHED = "train.py, forward KL to a cached teacher"
TRL_PRECISIONS = ("fp32", "bf16")
LOOPS = {"gkd": "GKDTrainer", "chunked": "TRL's chunked loss", "compiled": "TRL's chunked loss, models compiled"}
TRL_SIDES = {
    f"{title} {precision}{', freed memory reused' if keep else ''}": (loop, precision, keep)
    for loop, title in LOOPS.items()
    for precision in TRL_PRECISIONS
    for keep in (False, True)
}
HEADING = """| vocabulary | step | ms | ÷ cross-entropy alone | tokens/s | distillation's ÷ it \
| memory above imports, GB | distillation's ÷ it | whole process, GB |
|--:|---|--:|--:|--:|--:|--:|--:|--:|"""


@dataclass(frozen=True)
class Sizes:
    """Sizes of models, batches and measurements."""

    vocabularies: tuple[int, ...]
    student: ModelShape
    teacher: ModelShape
    context: int
    batch: int  # sequences
    steps: int  # of train.py
    trl_steps: int
    rounds: int
    threads: int
    trl_precisions: tuple[str, ...] = TRL_PRECISIONS
    trl_loops: tuple[str, ...] = tuple(LOOPS)

    @property
    def targets(self) -> int:
        """Target tokens per step."""
        return self.batch * self.context

    @property
    def keys(self) -> list[str]:
        """Arguments of train.py for a student on the CPU."""
        student = self.student
        words = ["model=micro", f"model.n_layer={student.n_layer}", f"model.n_head={student.n_head}"]
        words += [f"model.n_embd={student.n_embd}", "optimizer=adamw", f"context={self.context}"]
        words += [f"{key}={self.steps}" for key in ("steps", "validate_every", "checkpoint_every")]
        return [*words, f"batch_tokens={self.targets}", "accelerator=cpu", "devices=1", f"threads={self.threads}"]


FULL = Sizes(
    vocabularies=(4_096, 50_257),
    student=ModelShape(n_layer=4, n_head=4, n_embd=256),
    teacher=ModelShape(n_layer=8, n_head=8, n_embd=512),
    context=CONTEXT,
    batch=BATCH,
    steps=HEAD_COMPILE_STEPS,  # minimum for which the LM head is compiled
    trl_steps=8,  # a step takes ten seconds with a vocabulary of 50,257
    rounds=3,
    threads=cpu_cores(),
)
TINY = Sizes((300,), ModelShape(1, 1, 16), ModelShape(1, 2, 32), 32, 2, steps=12, trl_steps=4, rounds=1, threads=1)


@dataclass(frozen=True)
class Measured:
    """Time of a step and memory in bytes."""

    milliseconds: float
    before_model: float  # resident set after imports
    peak: float  # peak resident set

    @property
    def above(self) -> float:
        return self.peak - self.before_model


Results = dict[tuple[int, str], Measured]


def write_inputs(folder: Path, teacher: ModelShape, vocab_size: int, train_tokens: int) -> None:
    """Write the folders corpus, tokenizer and teacher, with random weights."""
    write_corpus(folder / "corpus", vocab_size, train_tokens)
    write_tokenizer(folder / "tokenizer", vocab_size)
    torch.manual_seed(1)
    to_hf(Backbone(replace(teacher, vocab_size=vocab_size))).save_pretrained(folder / "teacher")


class Bench:
    """Files shared by all sides for one vocabulary, and a function per side."""

    def __init__(self, folder: Path, sizes: Sizes, vocab_size: int, loss: str, trl_python: Path | None) -> None:
        self.folder, self.sizes, self.trl_python = folder, sizes, trl_python
        self.loss_arguments, self.beta = LOSSES[loss]
        self.runs = 0
        self.corpus, self.tokenizer, self.teacher = (folder / name for name in ("corpus", "tokenizer", "teacher"))
        write_inputs(folder, sizes.teacher, vocab_size, train_tokens=200_000)

    def sides(self) -> dict[str, Callable[[], Measured]]:
        distill = ["task=distill", f"teacher={self.teacher}", "preflight=off", "loss.hard_weight=0"]
        cached = ["loss=forward_kl", "teacher_cache=sampled", f"cache_dir={self.folder / 'cache'}"]
        found: dict[str, Callable[[], Measured]] = {
            DISTILLATION: partial(self.ours, [*distill, *self.loss_arguments]),
            CACHED: partial(self.ours, [*distill, *cached]),
            CROSS_ENTROPY: partial(self.ours, ["task=pretrain"]),
        }
        if self.trl_python is not None:
            for name, (loop, precision, keep) in TRL_SIDES.items():
                if precision in self.sizes.trl_precisions and loop in self.sizes.trl_loops:
                    found[name] = partial(self.trl, loop, precision, keep)
        return found

    def ours(self, task: list[str]) -> Measured:
        """Measure a complete run of train.py in bf16."""
        sizes = self.sizes
        arguments = [*task, *bin_data(self.corpus, self.tokenizer), *sizes.keys, f"sample_every={sizes.steps}"]
        arguments += [f"micro_batch={sizes.batch}", "precision=bf16", "logger=csv"]
        arguments += [STEP_TIMES, STEP_MEMORY, "callbacks.checkpoint.verify_export=false"]
        self.runs += 1
        run_dir = self.folder / f"run-{self.runs}"
        train(run_dir, arguments)
        memory = json.loads((run_dir / "step_memory.json").read_text())
        return Measured(json.loads((run_dir / "step_times.json").read_text())["step"], **memory)

    def trl(self, loop: str, precision: str, keep_freed_memory: bool) -> Measured:
        """Measure TRL in its environment, with the same teacher, corpus and number of target tokens."""
        sizes, student = self.sizes, self.sizes.student
        given = {
            "loop": loop,
            "corpus": self.corpus,
            "tokenizer": self.tokenizer,
            "teacher": self.teacher,
            "precision": precision,
        }
        given |= {"layers": student.n_layer, "heads": student.n_head, "width": student.n_embd, "beta": self.beta}
        given |= {"context": sizes.context, "batch": sizes.batch, "steps": sizes.trl_steps, "threads": sizes.threads}
        found = trl_step(str(self.trl_python), given, ["--keep-freed-memory"] if keep_freed_memory else [])
        if found["targets"] != sizes.targets:
            raise RuntimeError(f"TRL has {found['targets']} target tokens per step, train.py {sizes.targets}.")
        return Measured(found["milliseconds"], found["before_model"], found["peak"])


def trl_step(
    python: str,
    options: Mapping[str, Any],
    flags: Sequence[str] = (),
    timeout: float | None = None,
    script: str = "trl_step",
) -> dict[str, Any]:
    """Run trl_step.py, or another script, with these options in an environment with TRL and return what it prints.

    Raises:
        RuntimeError: it failed.
    """
    command = [python, "-m", f"benchmarks.{script}", *flags]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    if ended.returncode:
        raise RuntimeError(f"exit code {ended.returncode} from {' '.join(command)}\n{ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])  # after the output of its libraries


def measure(sizes: Sizes, loss: str, trl_python: Path | None) -> Results:
    """Return medians over the rounds by (vocabulary, side)."""
    several: dict[tuple[int, str], list[Measured]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        benches = {v: Bench(Path(scratch) / str(v), sizes, v, loss, trl_python) for v in sizes.vocabularies}
        for _ in range(sizes.rounds):
            for vocab_size, bench in benches.items():
                for name, side in bench.sides().items():
                    one = side()
                    several[vocab_size, name].append(one)
                    print(f"V={vocab_size} {name}: {one.milliseconds:.0f} ms, {one.peak / 1e9:.2f} GB", file=sys.stderr)
    fields = ("milliseconds", "before_model", "peak")
    return {
        key: Measured(*(statistics.median(vars(one)[field] for one in ones) for field in fields))
        for key, ones in several.items()
    }


def markdown(results: Results, targets: int) -> str:
    """Format a table with the ratios of train.py's distillation to each side, in tokens per second and memory."""
    rows = [HEADING]
    for (vocab_size, name), one in results.items():
        ours, alone = results[vocab_size, DISTILLATION], results[vocab_size, CROSS_ENTROPY]
        time = f"{one.milliseconds:,.0f} | {one.milliseconds / alone.milliseconds:.2f}"
        speed = f"{targets / one.milliseconds * 1e3:,.0f} | {one.milliseconds / ours.milliseconds:.2f}"
        memory = f"{one.above / 1e9:.2f} | {ours.above / one.above:.2f} | {one.peak / 1e9:.2f}"
        rows.append(f"| {vocab_size:,} | {name} | {time} | {speed} | {memory} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", type=Path, help="Python of an environment with TRL (default: $TRL_PYTHON)")
    parser.add_argument("--loss", choices=LOSSES, default="jsd", help="the divergence, without labels (default: jsd)")
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--trl-precisions", choices=TRL_PRECISIONS, nargs="+", default=TRL_PRECISIONS)
    parser.add_argument("--trl-loops", choices=LOOPS, nargs="+", default=tuple(LOOPS))
    parser.add_argument("--vocabularies", type=int, nargs="+", default=FULL.vocabularies)
    parser.add_argument("--tiny", action="store_true", help="takes seconds; results are meaningless")
    options = parser.parse_args()
    trl_python = options.trl_python or (Path(os.environ["TRL_PYTHON"]) if os.environ.get("TRL_PYTHON") else None)
    if trl_python is not None and not trl_python.is_file():
        parser.error(f"--trl-python {trl_python}: no such file")
    full = replace(FULL, vocabularies=tuple(options.vocabularies), rounds=options.rounds)
    full = replace(full, trl_precisions=tuple(options.trl_precisions), trl_loops=tuple(options.trl_loops))
    sizes = TINY if options.tiny else full
    transformers_logging.disable_progress_bar()
    # Absolute but not resolved: Python finds its environment through the symlink.
    results = measure(sizes, options.loss, trl_python.absolute() if trl_python else None)
    print(markdown(results, sizes.targets))
    if trl_python is None:
        print("\nWithout --trl-python there is no comparison with TRL; see docs/measurements/performance.md.")


if __name__ == "__main__":
    main()
