"""Planned and measured peak memory of short runs of train.py on a CPU, each in a separate process.

    python -m benchmarks.benchmark_memory_plan                            runs with default callbacks and logger
    python -m benchmarks.benchmark_memory_plan --drawn 24 --seed 0        random configurations

A default run has 30 steps, two validations, samples, three checkpoints written beside the training, an export with its
verification, and W&B offline. A random configuration has three steps, a validation and a checkpoint, with random
tokens and weights. The measured value is report.json's `peak_memory_bytes`; the planned one is from the run's
config.yaml, written before the model is built. Prints a Markdown table and the median. About 15 minutes on two cores;
the largest run takes 4 GB.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.shape import SHAPES
from benchmarks.synthetic_corpus import write_data, write_tokenizer
from benchmarks.train_command import ROOT, bin_data, train
from gpt2lab.model.backbone import Backbone, to_hf

MODEL_FILES = "import sys; from benchmarks.benchmark_memory_plan import write_model; write_model(*sys.argv[1:])"


@dataclass(frozen=True)
class Case:
    """Configuration of one run."""

    like: str  # pretrain, distill, distill cached, finetune, LoRA
    model: str
    vocabulary: int
    context: int
    rows: int  # per micro-batch
    precision: str
    optimizer: str
    teacher: str = ""
    more: tuple[str, ...] = ()
    parts: int = 1  # micro-batches per step
    ranks: int = 1
    strategy: str = "auto"


ON_ONE_CORE = ("accelerator=cpu", "devices=1", "threads=1")
SHORT = ("steps=30", "checkpoint_every=10", "validate_every=15", "trainer.limit_val_batches=2", *ON_ONE_CORE)
SCORED_TEXTS = "task.text.examples=16"  # of fine-tuning
DISTILL = ("task=distill", "preflight=off", "teacher={micro}")
FINETUNE = ("task=finetune", "init={micro}")
DEFAULT_RUNS = {  # name → arguments; {name} is the directory of an earlier run
    "nano": ("model=nano",),
    "micro": ("model=micro",),
    "mini": ("model=mini",),
    "nano-fp32": ("model=nano", "precision=fp32", "logger=csv"),
    "micro-fp32": ("model=micro", "precision=fp32"),
    "mini-fp32-checkpointed": ("model=mini", "precision=fp32", "activation_checkpointing=true"),
    "distill": (*DISTILL, "model=nano"),
    "distill-fp32": ("task=distill", "preflight=off", "teacher={mini}", "model=micro", "precision=fp32"),
    "distill-cached": ("task=distill", "preflight=off", "teacher={mini}", "model=micro", "teacher_cache=sampled"),
    "distill-on-policy": (*DISTILL, "init={nano}", "data=summarize", "sequences=gkd", "loss=jsd"),
    "finetune": FINETUNE,
    "finetune-fp32": (*FINETUNE, "precision=fp32"),
    "LoRA": ("task=finetune", "init={mini}", "task.lora.rank=8"),
}
CHECKPOINTED = ("activation_checkpointing=true",)
SMALLER = {"micro": "nano", "mini": "micro", "distil": "mini"}  # teacher → student
TOKENS = (1024, 8192)  # per micro-batch, minimum and maximum


def sample_cases(count: int, seed: int) -> list[Case]:
    """Sample configurations over all tasks, precisions and strategies, with sizes suitable for a CPU."""
    random_state = random.Random(seed)
    return [_sample_case(random_state) for _ in range(count)]


def _sample_case(random_state: random.Random) -> Case:
    draw = random_state.choice
    like = draw(("pretrain", "pretrain", "distill", "distill cached", "finetune", "LoRA"))
    context = 256 if like in ("finetune", "LoRA") else draw((128, 256, 512, 1024))  # the longest pairs have 256 tokens
    rows = draw([rows for rows in (1, 2, 4, 8, 16, 32) if TOKENS[0] <= rows * context <= TOKENS[1]])
    precision, optimizer = draw(("fp32", "bf16", "bf16_true")), draw(("adamw", "muon"))
    teacher = draw(tuple(SMALLER)) if like.startswith("distill") else ""
    model, more = SMALLER.get(teacher) or draw(("nano", "micro", "mini", "distil")), draw(((), (), CHECKPOINTED))
    if like == "LoRA":
        precision, optimizer, more = draw(("fp32", "bf16")), "adamw", (f"task.lora.rank={draw((4, 8, 16))}",)
    elif like == "distill cached":
        more = (f"teacher_cache={draw(('sampled', 'topk'))}", *more)
    vocabulary, parts = draw((4_096, 8_192, 16_384, 50_257)), draw((1, 1, 2))
    ranks, strategy = draw(((1, "auto"), (1, "auto"), (2, "ddp"), (2, "fsdp")))
    return Case(like, model, vocabulary, context, rows, precision, optimizer, teacher, more, parts, ranks, strategy)


@dataclass(frozen=True)
class Found:
    """Planned and measured bytes of one run."""

    planned: int
    measured: int

    @property
    def error(self) -> float:
        """Relative error of the peak."""
        return self.planned / self.measured - 1


def write_model(folder: str, size: str, vocabulary: str) -> None:
    """Write a Hugging Face folder of a model with random weights."""
    torch.manual_seed(1)
    to_hf(Backbone(replace(SHAPES[size], vocab_size=int(vocabulary)))).save_pretrained(folder)


def model_folder(folder: Path, size: str, vocabulary: int) -> Path:
    """Return the folder of that model with a tokenizer, made once in a separate process."""
    made = folder / f"model-{size}-{vocabulary}"
    if not made.exists():
        command = [sys.executable, "-c", MODEL_FILES, str(made), size, str(vocabulary)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        write_tokenizer(made, vocabulary)
    return made


def write_pairs(file: Path, pairs: int = 400) -> None:
    """Write pairs of random words: sources of 60 to 240 letters, targets of 12."""
    random_state = random.Random(0)

    def letters(count: int) -> str:
        return "".join(random_state.choice("abcdefghij ") for _ in range(count))

    lines = [{"source": letters(random_state.randint(60, 240)), "target": letters(12)} for _ in range(pairs)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def keys(case: Case, folder: Path) -> list[str]:
    """Return the arguments of a case."""
    words = [f"context={case.context}", f"micro_batch={case.rows}", f"precision={case.precision}"]
    words += [f"optimizer={case.optimizer}", *case.more, "steps=3", "log_every=1", "callbacks=minimal", "logger=none"]
    words += ["validate_every=3", "checkpoint_every=3", "accelerator=cpu", f"devices={case.ranks}"]
    words += [f"strategy={case.strategy}", f"threads={2 // case.ranks}"]
    words += [f"cache_dir={folder / 'cache'}"]
    if case.like in ("finetune", "LoRA"):
        if not (folder / "pairs.jsonl").exists():
            write_pairs(folder / "pairs.jsonl")
        start = model_folder(folder, case.model, case.vocabulary)
        words += ["task=finetune", f"init={start}", "data=pairs", f"path={folder / 'pairs.jsonl'}"]
        return [*words, f"batch_sequences={case.rows * case.parts * case.ranks}", "task.text.examples=0"]
    data = folder / f"data-{case.vocabulary}"
    if not data.exists():
        write_data(data, case.vocabulary, train_tokens=200_000, val_tokens=8_193)
    words += [f"model={case.model}", f"batch_tokens={case.context * case.rows * case.parts * case.ranks}"]
    if case.teacher:
        teacher = model_folder(folder, case.teacher, case.vocabulary)
        words += ["task=distill", "preflight=off", f"teacher={teacher}"]
    return [*words, *bin_data(data / "corpus", data / "tokenizer")]


def measure(case: Case, folder: Path) -> Found:
    """Run a case."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        return _found(train(Path(scratch) / "run", keys(case, folder)))


def default_keys(name: str, folder: Path) -> list[str]:
    """Return the arguments of a default run, whose models are in directories of earlier runs in `folder`."""
    arguments = [key.format(**{one: folder / one for one in DEFAULT_RUNS}) for key in DEFAULT_RUNS[name]]
    scored = [SCORED_TEXTS] if "task=finetune" in arguments else []
    return [*arguments, *SHORT, *scored, f"cache_dir={folder / 'cache'}"]


def measure_default(name: str, folder: Path) -> Found:
    """Run a default run into `folder`/`name`, where later runs find its model."""
    return _found(train(folder / name, default_keys(name, folder)))


def _found(report: dict[str, Any]) -> Found:
    return Found(int(report["planned_memory_bytes"]), int(report["peak_memory_bytes"]))


def row(run: str, found: Found) -> str:
    """Format a line of the table."""
    return f"| {run} | {found.planned / 1e9:.2f} | {found.measured / 1e9:.2f} | {found.error:+.0%} |"


def description(case: Case) -> str:
    """Describe a random case in a table."""
    model = f"{case.model} ← {case.teacher}" if case.teacher else case.model
    settings = [case.precision, case.optimizer, *(word.removeprefix("task.") for word in case.more)]
    settings += [f"{case.strategy} on {case.ranks}"] if case.ranks > 1 else []
    batch = f"{case.rows} × {case.context}" + (f", {case.parts} a step" if case.parts > 1 else "")
    return f"{case.like} {model}, vocabulary {case.vocabulary:,}, {batch}, {', '.join(settings)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--drawn", type=int, default=0, help="number of random configurations to run instead")
    parser.add_argument("--seed", type=int, default=0, help="seed of random configurations")
    options = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")
    print("| run | planned, GB | measured, GB | error |\n|---|--:|--:|--:|", flush=True)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cases = sample_cases(options.drawn, options.seed)
        runs = [(description(case), partial(measure, case)) for case in cases] or [
            (f"`{' '.join(keys)}`", partial(measure_default, name)) for name, keys in DEFAULT_RUNS.items()
        ]
        for name, run in tqdm(runs, "runs", disable=None):
            found.append(run(folder))
            print(row(name, found[-1]), flush=True)
    errors = [abs(one.error) for one in found]
    print(f"\n{len(errors)} runs: median error {statistics.median(errors):.1%}, largest {max(errors):.1%}.")


if __name__ == "__main__":
    main()
