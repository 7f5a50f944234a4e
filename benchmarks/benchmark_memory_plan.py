"""Predicted and measured peak memory of short runs of train.py on a CPU, each in a separate process.

    python -m benchmarks.benchmark_memory_plan
    python -m benchmarks.benchmark_memory_plan --drawn 24 --seed 0        random configurations

Each run has three steps, a validation and a checkpoint, with random tokens and weights; none was used to fit the plan's
constants. The measured value is report.json's `peak_memory_bytes`; the predicted one is from the run's config.yaml,
written before the model is built. Both include the process without a model; the error without it is a separate column.
Prints a Markdown table and the medians. About 10 minutes on two cores; the largest run takes 4 GB.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from benchmarks.synthetic_corpus import write_corpus, write_tokenizer
from benchmarks.train_command import ROOT, bin_data, train
from gpt2lab.model.backbone import Backbone, to_hf
from gpt2lab.settings import ModelShape

SIZES = {"nano": (2, 128, 2), "micro": (4, 256, 4), "mini": (6, 384, 6), "distil": (6, 768, 12), "small": (12, 768, 12)}
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


CHECKPOINTED = ("activation_checkpointing=true",)
CASES = (
    Case("pretrain", "nano", 4_096, 256, 32, "fp32", "adamw"),
    Case("pretrain", "nano", 16_384, 128, 16, "bf16", "muon"),
    Case("pretrain", "nano", 50_257, 256, 16, "bf16", "adamw"),
    Case("pretrain", "micro", 4_096, 256, 8, "bf16", "muon"),
    Case("pretrain", "micro", 8_192, 1024, 4, "fp32", "adamw"),
    Case("pretrain", "micro", 50_257, 256, 8, "fp32", "muon"),
    Case("pretrain", "micro", 16_384, 512, 16, "bf16", "adamw", parts=2),
    Case("pretrain", "mini", 4_096, 512, 16, "bf16", "adamw"),
    Case("pretrain", "mini", 16_384, 256, 16, "fp32", "muon"),
    Case("pretrain", "mini", 8_192, 256, 4, "fp32", "adamw", parts=3),
    Case("pretrain", "mini", 50_257, 256, 8, "bf16", "muon"),
    Case("pretrain", "mini", 4_096, 512, 8, "bf16", "muon", more=CHECKPOINTED),
    Case("pretrain", "micro", 8_192, 256, 32, "fp32", "adamw", more=CHECKPOINTED),
    Case("pretrain", "distil", 16_384, 256, 8, "fp32", "adamw"),
    Case("pretrain", "small", 16_384, 256, 4, "bf16", "adamw"),
    Case("distill", "nano", 4_096, 256, 16, "bf16", "adamw", "micro"),
    Case("distill", "micro", 16_384, 256, 8, "fp32", "muon", "mini"),
    Case("distill", "mini", 8_192, 256, 8, "bf16", "adamw", "distil", ("loss=reverse_kl",)),
    Case("distill cached", "micro", 16_384, 256, 16, "bf16", "adamw", "mini", ("teacher_cache=sampled",)),
    Case("distill cached", "nano", 4_096, 256, 16, "fp32", "muon", "micro", ("teacher_cache=topk",)),
    Case("finetune", "micro", 4_096, 256, 16, "fp32", "muon"),
    Case("finetune", "mini", 16_384, 256, 16, "bf16", "adamw"),
    Case("LoRA", "mini", 8_192, 256, 16, "fp32", "adamw", more=("task.lora.rank=8",)),
    Case("LoRA", "distil", 50_257, 256, 8, "bf16", "adamw", more=("task.lora.rank=16",)),
)


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
    """Predicted and measured bytes of one run."""

    predicted: int
    measured: int
    process: int

    @property
    def error(self) -> float:
        """Relative error of the peak."""
        return self.predicted / self.measured - 1

    @property
    def error_above(self) -> float:
        """Relative error without the memory of a process without a model."""
        return (self.predicted - self.process) / (self.measured - self.process) - 1


def write_model(folder: str, size: str, vocabulary: str) -> None:
    """Write a Hugging Face folder of a model with random weights."""
    layers, width, heads = SIZES[size]
    torch.manual_seed(1)
    to_hf(Backbone(ModelShape(layers, heads, width, 1024, int(vocabulary)))).save_pretrained(folder)


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
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


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
    corpus, tokenizer = folder / f"corpus-{case.vocabulary}", folder / f"tokenizer-{case.vocabulary}"
    if not corpus.exists():
        write_corpus(corpus, case.vocabulary, train_tokens=200_000, val_tokens=8_193)
        write_tokenizer(tokenizer, case.vocabulary)
    words += [f"model={case.model}", f"batch_tokens={case.context * case.rows * case.parts * case.ranks}"]
    if case.teacher:
        teacher = model_folder(folder, case.teacher, case.vocabulary)
        words += ["task=distill", "preflight=off", f"teacher={teacher}"]
    return [*words, *bin_data(corpus, tokenizer)]


def measure(case: Case, folder: Path) -> Found:
    """Run a case."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        run_dir = Path(scratch) / "run"
        report = train(run_dir, keys(case, folder))
        planned = OmegaConf.load(run_dir / "config.yaml").prepared.planned_memory
        return Found(int(planned.peak), int(report["peak_memory_bytes"]), int(planned.process))


def row(case: Case, found: Found) -> str:
    """Format a line of the table."""
    model = f"{case.model} ← {case.teacher}" if case.teacher else case.model
    settings = [case.precision, case.optimizer, *(word.removeprefix("task.") for word in case.more)]
    settings += [f"{case.strategy} on {case.ranks}"] if case.ranks > 1 else []
    batch = f"{case.rows} × {case.context}" + (f", {case.parts} a step" if case.parts > 1 else "")
    sizes = f"{found.predicted / 1e9:.2f} | {found.measured / 1e9:.2f} | {found.error:+.0%} | {found.error_above:+.0%}"
    return f"| {case.like} | {model} | {case.vocabulary:,} | {batch} | {', '.join(settings)} | {sizes} |"


def medians(found: list[Found]) -> str:
    """Summarize the medians of the absolute errors."""
    whole = statistics.median(abs(one.error) for one in found)
    above = statistics.median(abs(one.error_above) for one in found)
    worst = max(abs(one.error) for one in found)
    return (
        f"{len(found)} runs: median error {whole:.1%} of the measured peak, largest {worst:.1%}; "
        f"above the process, median {above:.1%}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=len(CASES), help="number of cases, the first ones")
    parser.add_argument("--drawn", type=int, default=0, help="number of random cases to use instead")
    parser.add_argument("--seed", type=int, default=0, help="seed of random cases")
    options = parser.parse_args()
    print(
        "| task | model | vocabulary | micro-batch | settings | predicted, GB | measured, GB | error | above process |"
    )
    print("|---|---|--:|---|---|--:|--:|--:|--:|", flush=True)
    every = []
    with tempfile.TemporaryDirectory() as folder:
        cases = sample_cases(options.drawn, options.seed) if options.drawn else CASES[: options.cases]
        for case in tqdm(cases, "runs", disable=None):
            every.append(measure(case, Path(folder)))
            print(row(case, every[-1]), flush=True)
    print(f"\n{medians(every)}")


if __name__ == "__main__":
    main()
