"""Sizes, inputs and runs that end in time: what all checks of gpu_check.py share."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.synthetic_corpus import write_corpus, write_tokenizer
from benchmarks.train_command import ROOT, bin_data, run_train, train
from gpt2lab.data.tokenizer import load_tokenizer
from gpt2lab.model.backbone import Backbone, to_hf
from gpt2lab.settings import ModelShape


@dataclass(frozen=True)
class Sizes:
    """Sizes of models and batches.

    Attributes:
        models: names of the small, the medium and the miniature model of train.py.
        student, teacher: layers, heads and width.
        sequences: in a micro-batch of the small model.
        budget: target tokens on which the teacher of the experiment is trained.
    """

    accelerator: str
    vocab_size: int
    context: int
    sequences: int
    models: tuple[str, str, str]
    student: tuple[int, int, int]
    teacher: tuple[int, int, int]
    steps: int
    rounds: int
    budget: int


GPU = Sizes(
    accelerator="gpu",
    vocab_size=50_304,  # a multiple of 64 for every side: GPUs multiply odd sizes slowly
    context=1024,
    sequences=16,
    models=("small", "medium", "mini"),
    student=(12, 12, 768),
    teacher=(24, 16, 1024),
    steps=40,
    rounds=3,
    budget=16_000_000,
)
REHEARSAL = Sizes("cpu", 320, 32, 4, ("nano", "nano", "nano"), (2, 2, 128), (3, 2, 160), 20, 1, 16_384)


class NotRun(Exception):
    """A check cannot be run here; the message is the reason."""


@dataclass(frozen=True)
class Bench:
    """A folder for runs, with corpus and tokenizer, sizes, and the time at which every run has to end.

    Attributes:
        deadline: of time.monotonic().
        note: receives what a check has found so far.
    """

    folder: Path
    sizes: Sizes
    deadline: float
    note: Callable[[str], None] = lambda _: None

    @property
    def seconds_left(self) -> float:
        return max(self.deadline - time.monotonic(), 1.0)

    @property
    def on_gpu(self) -> bool:
        return self.sizes.accelerator == "gpu"

    @property
    def batch_tokens(self) -> int:
        return self.sizes.sequences * self.sizes.context

    def write_inputs(self) -> None:
        """Write a corpus and a tokenizer of any text."""
        context = self.sizes.context
        tokens = {"train_tokens": 4_000 * context, "val_tokens": 64 * context}
        write_corpus(self.folder / "corpus", self.sizes.vocab_size, **tokens)
        write_tokenizer(self.folder / "tokenizer", self.sizes.vocab_size)

    def on_corpus(self, model: str, steps: int) -> list[str]:
        """Return arguments for training on the synthetic corpus, two micro-batches a step."""
        sizes = [f"context={self.sizes.context}", f"batch_tokens={2 * self.batch_tokens}", "log_every=5"]
        data = bin_data(self.folder / "corpus", self.folder / "tokenizer")
        return [f"model={model}", *data, *sizes, *self.of_length(steps), "callbacks=minimal"]

    def of_length(self, steps: int) -> list[str]:
        lengths = [f"steps={steps}", f"validate_every={steps}", f"checkpoint_every={steps}"]
        return [*lengths, f"accelerator={self.sizes.accelerator}", "devices=1", "logger=csv"]

    def train(self, name: str, arguments: list[str]) -> dict[str, Any]:
        """Run train.py into the folder `name` and return its report; the checkpoints are deleted."""
        report = train(self.folder / name, arguments, self.seconds_left)
        shutil.rmtree(self.folder / name / "checkpoints", ignore_errors=True)
        if not report["train_loss"] < 12:
            raise RuntimeError(f"training loss {report['train_loss']}")
        return report

    def resume(self, run_dir: Path) -> None:
        run_train([f"resume={run_dir}"], self.seconds_left)

    def random_teacher(self) -> Path:
        """Write a teacher with random weights, which the preflight would refuse."""
        folder = self.folder / "random-teacher"
        if not folder.exists():
            torch.manual_seed(1)
            shape = ModelShape(*self.sizes.teacher, self.sizes.context, self.sizes.vocab_size)
            to_hf(Backbone(shape)).save_pretrained(folder)
            load_tokenizer(str(self.folder / "tokenizer")).save_pretrained(folder)
        return folder


def kernels(bench: Bench, name: str, python: str | None = None) -> str:
    """Run a check of gpu_kernels.py in its own process, so that it cannot hang or spoil the GPU for the others.

    Args:
        python: of an environment with other sides of the comparison; None: this one.
    """
    command = [python or sys.executable, "-m", "benchmarks.gpu_kernels", name]
    command += [] if bench.on_gpu else ["--tiny"]
    errors = bench.folder / f"{name}.txt"
    with errors.open("w+") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True)
        try:
            lines = []
            for line in process.stdout or ():
                lines.append(line.strip())
                bench.note(lines[-1])
            code = process.wait()
        finally:
            process.kill()
    if code or not lines:
        raise RuntimeError(f"exit code {code}: {' '.join(errors.read_text().split())[-500:]}")
    return lines[-1]
