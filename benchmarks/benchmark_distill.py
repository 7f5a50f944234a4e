"""Distillation step of train.py, compared with TRL's, a cached teacher, and cross-entropy only.

    python -m benchmarks.benchmark_distill --trl-python /path/to/environment/bin/python        (make bench TRL_PYTHON=…)

Student 4 layers, width 256; teacher 8 layers, width 512; random weights and tokens; T = 256, 2,048 targets per step,
AdamW, on the CPU. Every measurement is a new process, sides alternate, and values are medians over rounds. See
docs/measurements/performance.md for TRL's environment; without it TRL is skipped. Prints a Markdown table.
"""

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.alternation import Record, alternate, median_records
from benchmarks.shape import BATCH, CONTEXT
from benchmarks.synthetic_corpus import write_data
from benchmarks.train_command import ROOT, STEP_TIMES, new_run_dir, of_length, train
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
ALLOCATORS = {"default": "", "reused": ", freed memory reused"}
LOOPS = {"gkd": "GKDTrainer", "chunked": "TRL's chunked loss", "compiled": "TRL's chunked loss, models compiled"}
TRL_SIDES = {
    f"{title} {precision}{text}": (loop, precision, allocator)
    for loop, title in LOOPS.items()
    for precision in TRL_PRECISIONS
    for allocator, text in ALLOCATORS.items()
}
HEADING = """| vocabulary | step | ms | ÷ cross-entropy alone | tokens/s | distillation's ÷ it \
| memory above imports, GB | distillation's ÷ it | whole process, GB |
|--:|---|--:|--:|--:|--:|--:|--:|--:|"""
NO_TRL = "\nWithout --trl-python there is no comparison with TRL; see docs/measurements/performance.md."


@dataclass(frozen=True)
class Sizes:
    """Sizes of models, batches and measurements, also of benchmark_on_policy.py and benchmark_ten_students.py."""

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
        words += [*of_length(self.steps), f"batch_tokens={self.targets}"]
        return [*words, "accelerator=cpu", "devices=1", f"threads={self.threads}"]

    @property
    def trl_options(self) -> dict[str, int]:
        """Options of both TRL scripts."""
        student = self.student
        sizes = {"layers": student.n_layer, "heads": student.n_head, "width": student.n_embd}
        return {**sizes, "batch": self.batch, "steps": self.trl_steps, "threads": self.threads}


FULL = Sizes(
    vocabularies=(4_096, 50_257),
    student=ModelShape(n_layer=4, n_head=4, n_embd=256),
    teacher=ModelShape(n_layer=8, n_head=8, n_embd=512),
    context=CONTEXT,
    batch=BATCH,
    steps=HEAD_COMPILE_STEPS,  # minimum for which the LM head is compiled
    trl_steps=8,  # a step takes ten seconds with a vocabulary of 50,257
    rounds=5,
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


def write_inputs(folder: Path, teacher: ModelShape, vocab_size: int, train_tokens: int = 200_000) -> list[str]:
    """Write the folders corpus, tokenizer and teacher, with random weights; return train.py's arguments for data."""
    torch.manual_seed(1)
    to_hf(Backbone(replace(teacher, vocab_size=vocab_size))).save_pretrained(folder / "teacher")
    return write_data(folder, vocab_size, train_tokens)


class Bench:
    """Files shared by all sides for one vocabulary, and a function per side."""

    def __init__(
        self,
        folder: Path,
        sizes: Sizes,
        vocab_size: int,
        loss: str,
        trl_python: Path | None,
        allocators: Sequence[str] = tuple(ALLOCATORS),
    ) -> None:
        self.folder, self.sizes, self.trl_python, self.allocators = folder, sizes, trl_python, allocators
        self.loss_arguments, self.beta = LOSSES[loss]
        self.data = write_inputs(folder, sizes.teacher, vocab_size)

    def sides(self) -> dict[str, Callable[[], Measured]]:
        distill = ["task=distill", f"teacher={self.folder / 'teacher'}", "preflight=off", "loss.hard_weight=0"]
        cached = ["loss=forward_kl", "teacher_cache=sampled", f"cache_dir={self.folder / 'cache'}"]
        found: dict[str, Callable[[], Measured]] = {
            DISTILLATION: partial(self.ours, [*distill, *self.loss_arguments]),
            CACHED: partial(self.ours, [*distill, *cached]),
            CROSS_ENTROPY: partial(self.ours, ["task=pretrain"]),
        }
        if self.trl_python is not None:
            for name, (loop, precision, allocator) in TRL_SIDES.items():
                chosen = precision in self.sizes.trl_precisions and loop in self.sizes.trl_loops
                if chosen and allocator in self.allocators:
                    found[name] = partial(self.trl, self.trl_python, loop, precision, allocator)
        return found

    def ours(self, task: list[str]) -> Measured:
        """Measure a complete run of train.py in bf16."""
        arguments = [*task, *self.data, *self.sizes.keys, f"micro_batch={self.sizes.batch}", "precision=bf16"]
        arguments += ["logger=csv", "callbacks.checkpoint.verify_export=false", f"sample_every={self.sizes.steps}"]
        run_dir = new_run_dir(self.folder)
        train(run_dir, [*arguments, STEP_TIMES, STEP_MEMORY])
        times, memory = (json.loads((run_dir / f"step_{name}.json").read_text()) for name in ("times", "memory"))
        return Measured(times["step"], **memory)

    def trl(self, python: Path, loop: str, precision: str, allocator: str) -> Measured:
        """Measure TRL in its environment, with the same teacher, corpus and number of target tokens."""
        given = {**self.sizes.trl_options, "loop": loop, "precision": precision, "beta": self.beta}
        given |= {name: self.folder / name for name in ("corpus", "tokenizer", "teacher")}
        given |= {"context": self.sizes.context}
        found = trl_step(str(python), given, ["--keep-freed-memory"] if allocator == "reused" else [])
        if found["targets"] != self.sizes.targets:
            raise RuntimeError(f"TRL has {found['targets']} target tokens per step, train.py {self.sizes.targets}.")
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


def measure(
    sizes: Sizes, sides: Callable[[Path, int], Mapping[str, Callable[[], Record]]]
) -> dict[tuple[int, str], Record]:
    """Return medians over the rounds by (vocabulary, side).

    Args:
        sides: returns the sides of a vocabulary; it writes their files into the given folder.
    """
    with tempfile.TemporaryDirectory() as scratch:
        every = {
            (vocab_size, name): side
            for vocab_size in sizes.vocabularies
            for name, side in sides(Path(scratch) / str(vocab_size), vocab_size).items()
        }
        return median_records(alternate(every, sizes.rounds))


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


def parse_options(
    parser: argparse.ArgumentParser, full: Sizes, tiny: Sizes, loops: Iterable[str]
) -> tuple[argparse.Namespace, Sizes]:
    """Add the options of a benchmark beside TRL, parse them all and return the sizes that they select."""
    parser.add_argument("--trl-python", type=Path, help="Python of an environment with TRL (default: $TRL_PYTHON)")
    parser.add_argument("--rounds", type=int, default=full.rounds)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=full.vocabularies)
    parser.add_argument("--trl-precisions", choices=TRL_PRECISIONS, nargs="+", default=TRL_PRECISIONS)
    parser.add_argument("--trl-loops", choices=loops, nargs="+", default=tuple(loops))
    parser.add_argument("--tiny", action="store_true", help="takes seconds; results are meaningless")
    options = parser.parse_args()
    if options.trl_python is None and os.environ.get("TRL_PYTHON"):
        options.trl_python = Path(os.environ["TRL_PYTHON"])
    if options.trl_python is not None:
        if not options.trl_python.is_file():
            parser.error(f"--trl-python {options.trl_python}: no such file")
        # Absolute but not resolved: Python finds its environment through the symlink.
        options.trl_python = options.trl_python.absolute()
    full = replace(full, vocabularies=tuple(options.vocabularies), rounds=options.rounds)
    sizes = replace(tiny if options.tiny else full, trl_loops=tuple(options.trl_loops))
    return options, replace(sizes, trl_precisions=tuple(options.trl_precisions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", choices=LOSSES, default="jsd", help="the divergence, without labels (default: jsd)")
    parser.add_argument("--trl-allocators", choices=ALLOCATORS, nargs="+", default=tuple(ALLOCATORS))
    options, sizes = parse_options(parser, FULL, TINY, LOOPS)
    transformers_logging.disable_progress_bar()
    rest = options.loss, options.trl_python, options.trl_allocators
    results = measure(sizes, lambda folder, v: Bench(folder, sizes, v, *rest).sides())
    print(markdown(results, sizes.targets))
    if options.trl_python is None:
        print(NO_TRL)


if __name__ == "__main__":
    main()
