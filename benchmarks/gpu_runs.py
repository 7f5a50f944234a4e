"""Checks of gpu_check.py that run train.py, with comparisons to nanoGPT and TRL if available.

Each returns its result as text and raises RuntimeError if the claim is violated.
"""

import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import benchmark_precisions
from benchmarks.benchmark_distill import LOOPS, trl_step
from benchmarks.benchmark_precisions import EXACT, OTHERS
from benchmarks.benchmark_training_step import nanogpt
from benchmarks.shape import STEPS
from benchmarks.train_command import ROOT, bin_data, run_train, train
from gpt2lab.data.tokenizer import load_tokenizer
from gpt2lab.model.backbone import Backbone, to_hf
from gpt2lab.settings import ModelShape

ACCELERATOR = "gpu"
VOCABULARY = 50_257
MEDIUM = 24, 16, 1024  # layers, heads, width
CONTEXT = 1024
BATCH_TOKENS = 32 * CONTEXT
SAME_LOSS = 0.02  # nats: FSDP compared with one device
SAME_RESUMED = 1e-3  # nats: without trainer.deterministic GPU kernels are not
DETERMINISTIC = "trainer.deterministic=true"
LIMIT = 400  # seconds of one run


def base(folder: Path, model: str, steps: int) -> list[str]:
    quiet = [f"{key}_every={steps}" for key in ("validate", "checkpoint")]
    sizes = [f"context={CONTEXT}", f"batch_tokens={BATCH_TOKENS}", f"steps={steps}", "log_every=5"]
    data = bin_data(folder / "corpus", folder / "tokenizer")
    fixed = [f"accelerator={ACCELERATOR}", "devices=1", "logger=csv", "callbacks=minimal"]
    return [f"model={model}", *data, *sizes, *quiet, *fixed]


def speed(model: str, micro_batch: int, *options: str, steps: int = 40) -> Callable[[Path], str]:
    """Make a check that trains some steps and reports speed, MFU and memory."""

    def run(folder: Path) -> str:
        arguments = [*base(folder, model, steps), f"micro_batch={micro_batch}", *options]
        report = _train_once(folder / "-".join([model, *options]).replace("=", "-"), arguments)
        if not report["train_loss"] < 12:
            raise RuntimeError(f"training loss {report['train_loss']}")
        used, planned = (report[key] / 2**30 for key in ("peak_memory_bytes", "planned_memory_bytes"))
        speed = f"{report['tokens_per_second']:,.0f} tokens/s, MFU {report['mfu']:.1%}"
        return f"{speed}, {used:.1f} GiB ({planned:.1f} planned)"

    return run


def compare_with_nanogpt(model_file: Path) -> Callable[[Path], str]:
    """Make a check of small and nanoGPT's model file, both compiled: 16 sequences of 1,024 tokens, bf16, AdamW."""

    def run(folder: Path) -> str:
        _, sequences, context = STEPS["small"]
        theirs = nanogpt(model_file, folder / "corpus", 50_304, compiled=True, steps=40, size="small")
        keys = ["compile=true", "precision=bf16", "optimizer=adamw", f"micro_batch={sequences}"]
        keys += [f"batch_tokens={sequences * context}"]
        report = _train_once(folder / "beside-nanogpt", [*base(folder, "small", 60), *keys])
        ours = report["tokens_per_second"]
        return f"{ours:,.0f} tokens/s, nanoGPT {theirs:,.0f}: {ours / theirs:.2f} ×"

    return run


def compare_with_trl(trl_python: str) -> Callable[[Path], str]:
    """Make a check of distilling medium to small (JSD, 8 × 1,024 tokens, bf16), also with two training loops of TRL."""

    def run(folder: Path) -> str:
        teacher = folder / "medium"
        torch.manual_seed(1)
        to_hf(Backbone(ModelShape(*MEDIUM, CONTEXT, VOCABULARY))).save_pretrained(teacher)
        keys = ["task=distill", f"teacher={teacher}", "preflight=off", "loss=jsd", "loss.beta=0.5"]
        keys += ["loss.hard_weight=0", "optimizer=adamw", "precision=bf16"]
        keys += ["micro_batch=8", f"batch_tokens={8 * CONTEXT}"]
        report = _train_once(folder / "beside-trl", [*base(folder, "small", 60), *keys])
        ours = report["tokens_per_second"], report["peak_memory_bytes"] / 2**30
        results = [f"{ours[0]:,.0f} tokens/s, {ours[1]:.1f} GiB"]
        given = {"corpus": folder / "corpus", "tokenizer": folder / "tokenizer", "teacher": teacher, "beta": 0.5}
        given |= {"layers": 12, "heads": 12, "width": 768, "batch": 8, "steps": 30, "threads": 8, "precision": "bf16"}
        for loop, context in {"gkd": CONTEXT - 1, "compiled": CONTEXT}.items():  # GKDTrainer has a prompt token before
            found = trl_step(trl_python, {**given, "loop": loop, "context": context}, timeout=LIMIT)
            theirs = found["targets"] / found["milliseconds"] * 1e3, found["peak"] / 2**30
            ratios = f"{ours[0] / theirs[0]:.2f} × the speed, {ours[1] / theirs[1]:.2f} × the memory"
            side = f"{LOOPS[loop]}, TRL {found['trl']}"
            results.append(f"{side}: {theirs[0]:,.0f} tokens/s, {theirs[1]:.1f} GiB; ours {ratios}")
        return "; ".join(results)

    return run


def distil_with_defaults(
    folder: Path, *options: str, model: str = "small", teacher_shape: tuple[int, int, int] = MEDIUM
) -> str:
    """Check the command of docs/distillation.md, task=distill model=small with a medium teacher, for 20 steps.

    The teacher has random weights, which the preflight would refuse.

    Args:
        options: further keys of train.py.
        teacher_shape: its layers, heads and width.
    """
    teacher = folder / "random-medium"
    torch.manual_seed(1)
    to_hf(Backbone(ModelShape(*teacher_shape, CONTEXT, VOCABULARY))).save_pretrained(teacher)
    load_tokenizer(str(folder / "tokenizer")).save_pretrained(teacher)
    usual = ["task=distill", f"model={model}", f"teacher={teacher}", "steps=20"]
    report = _train_once(folder / "defaults", [*usual, "preflight=off", *options])
    if not report["train_loss"] < 12:
        raise RuntimeError(f"training loss {report['train_loss']}")
    used = report["peak_memory_bytes"] / 2**30
    return f"{report['tokens_per_second']:,.0f} tokens/s, MFU {report['mfu']:.1%}, {used:.1f} GiB"


def fsdp_on_one_gpu(folder: Path) -> str:
    """Check that 30 steps have the same loss with FSDP (on one GPU) and without."""

    def run(strategy: str) -> float:
        arguments = [*base(folder, "small", 30), "micro_batch=8", "compile=false", f"strategy={strategy}"]
        return _train_once(folder / f"strategy-{strategy}", arguments)["val_loss"]

    with ThreadPoolExecutor() as pool:
        unsharded, sharded = pool.map(run, ("auto", "fsdp"))
    if not abs(unsharded - sharded) < SAME_LOSS:
        raise RuntimeError(f"val/loss {unsharded:.4f} unsharded, {sharded:.4f} sharded")
    return f"val/loss {sharded:.4f}, unsharded {unsharded:.4f}"


def resume_after_a_kill(folder: Path, model: str = "mini") -> str:
    """Check a run that is killed (SIGKILL) after its first checkpoint and resumed against an uninterrupted one."""
    arguments = [*base(folder, model, 150), "micro_batch=32", "compile=false", "checkpoint_every=50"]
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(train, folder / "unbroken", arguments, LIMIT)
        run_dir = folder / "killed"
        _kill_at_first_checkpoint([sys.executable, "train.py", *arguments, f"run_dir={run_dir}"], run_dir)
        run_train([f"resume={run_dir}"], LIMIT)
        unbroken = whole.result()["val_loss"]
    loss = json.loads((run_dir / "report.json").read_text())["val_loss"]
    if not abs(loss - unbroken) < SAME_RESUMED:
        raise RuntimeError(f"val/loss {loss:.5f} resumed, {unbroken:.5f} uninterrupted")
    return f"val/loss differs from the uninterrupted run's by {abs(loss - unbroken):.1e}"


def deterministic(*options: str, model: str = "mini") -> Callable[[Path], str]:
    """Make a check that deterministic runs end with the same bytes, one of them killed (SIGKILL) and resumed.

    They generate samples too: PyTorch has no deterministic algorithm for nucleus sampling on a GPU.
    """

    def run(folder: Path) -> str:
        name = "-".join(["deterministic", *(option.split("/")[-1] for option in options)]).replace("=", "-")
        usual = [*base(folder, model, 60), "micro_batch=16", "checkpoint_every=20", "callbacks=default", *options]
        usual += ["callbacks.checkpoint.verify_export=false", "callbacks.samples.max_new_tokens=16", "sample_every=60"]
        arguments = [*usual, DETERMINISTIC]
        first, second, killed = (folder / f"{name}-{run}" for run in ("first", "second", "killed"))
        usual_speed = train(folder / f"{name}-usual", usual, LIMIT)["tokens_per_second"]
        speed = train(first, arguments, LIMIT)["tokens_per_second"]
        train(second, arguments, LIMIT)
        _kill_at_first_checkpoint([sys.executable, "train.py", *arguments, f"run_dir={killed}"], killed)
        run_train([f"resume={killed}"], LIMIT)
        for other in (second, killed):
            for file in ("hf/model.safetensors", "samples.jsonl"):
                if (first / file).read_bytes() != (other / file).read_bytes():
                    raise RuntimeError(f"{file} of {other.name} and {first.name} differ")
        return f"three runs bitwise equal, one after SIGKILL; {speed / usual_speed:.2f} × the usual tokens/s"

    return run


def deterministic_distillation(folder: Path, model: str = "mini") -> str:
    """Check that deterministic distillation from a teacher with random weights ends with the same bytes."""
    teacher = folder / "teacher"
    torch.manual_seed(1)
    to_hf(Backbone(ModelShape(6, 6, 384, CONTEXT, VOCABULARY))).save_pretrained(teacher)
    options = ("task=distill", f"teacher={teacher}", "preflight=off", "compile=false")
    return deterministic(*options, model=model)(folder)


def precisions(folder: Path) -> str:
    """Check each precision against fp32 with the same seeds: nano, 300 steps on the standard library."""
    losses = benchmark_precisions.measure_losses(folder, ACCELERATOR, at_once=len(OTHERS[ACCELERATOR]) + 1)
    results, wrong = [f"fp32 {statistics.mean(losses[EXACT].values()):.3f}"], []
    for name, found in benchmark_precisions.compare_with_exact(losses).items():
        results.append(f"{name} {found.mean:+.4f} ({', '.join(f'{d:+.4f}' for d in found.differences.values())})")
        if not benchmark_precisions.is_within(found):
            wrong.append(name)
    if wrong:
        raise RuntimeError("val/loss: " + "; ".join(results))
    return "val/loss: " + "; ".join(results)


def _train_once(run_dir: Path, arguments: list[str]) -> dict[str, Any]:
    report = train(run_dir, arguments, LIMIT)
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    return report


def _kill_at_first_checkpoint(command: list[str], run_dir: Path) -> None:
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + LIMIT
    while not (run_dir / "checkpoints" / "last").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError("the run ended before it saved a checkpoint")
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
