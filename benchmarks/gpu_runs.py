"""Checks of gpu_check.py that measure the speed of train.py, some beside nanoGPT or TRL.

Each returns its result as text. "passed" is for a run that ended, whatever its speed.
"""

import gzip
import json
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.benchmark_distill import LOOPS, trl_step
from benchmarks.benchmark_training_step import nanogpt
from benchmarks.gpu_bench import Bench, NotRun
from benchmarks.shape import STEPS
from benchmarks.train_command import seconds_of_steps

# Part of a kernel's name → what it computes; the first that is contained counts. The compiler names a kernel of its own
# after all operations in it, attention among them.
KERNELS = {
    "triton": "fused elementwise and reductions",
    "flash": "attention",
    "fmha": "attention",
    "cudnn_generated": "attention",
    "multi_tensor": "optimizer",
    "adam": "optimizer",
    "gemm": "matrix products",
    "nvjet": "matrix products",
    "cutlass": "matrix products",
    "memcpy": "copies",
    "memset": "copies",
}
OTHER_KERNELS = "other kernels"
LIGER = "Liger's JSD, models compiled"
LATER_ROUND = 0.7  # seconds of a round that finds everything compiled ÷ those of the first one, an estimate


def speed(bench: Bench, model: str, options: Sequence[str]) -> str:
    """Train some steps and return speed, MFU and memory."""
    arguments = [*bench.on_corpus(model, bench.sizes.steps), f"micro_batch={bench.sizes.sequences}", *options]
    return _speed(bench.train("-".join(["speed", model, *options]).replace("=", "-"), arguments))


def _speed(report: Mapping[str, Any]) -> str:
    mfu = f", MFU {report['mfu']:.1%}" if report.get("mfu") is not None else ""
    used, planned = (report[key] / 2**30 for key in ("peak_memory_bytes", "planned_memory_bytes"))
    return f"{report['tokens_per_second']:,.0f} tokens/s{mfu}, {used:.1f} GiB ({planned:.1f} planned)"


def compare_with_nanogpt(bench: Bench, model_file: Path | None) -> str:
    """Compare train.py (AdamW, Muon) with nanoGPT's model file: compiled, bf16, one micro-batch a step, same tokens.

    A round is left out if the time is too short for it.
    """
    if model_file is None:
        raise NotRun("--nanogpt is not given")
    sizes, size = bench.sizes, "small" if bench.on_gpu else "mini"
    keys, seconds = _keys_beside_nanogpt(bench, size), 0.0
    found: dict[str, list[float]] = {"nanoGPT": [], "adamw": [], "muon": []}
    mfu: dict[str, float | None] = {}  # of one token a second
    for number in range(sizes.rounds):
        if number and bench.seconds_left < seconds:
            break
        started, corpus = time.monotonic(), bench.folder / "corpus"
        for optimizer in ("adamw", "muon"):
            arguments = [*bench.on_corpus(size, sizes.steps), *keys, f"optimizer={optimizer}"]
            report = bench.train(f"beside-nanogpt-{optimizer}-{number}", arguments)
            found[optimizer].append(report["tokens_per_second"])
            mfu[optimizer] = report["mfu"] and report["mfu"] / report["tokens_per_second"]
            bench.note(_beside_nanogpt(found, mfu))
        found["nanoGPT"].append(
            nanogpt(model_file, corpus, sizes.vocab_size, True, sizes.steps, size, bench.seconds_left)
        )
        bench.note(_beside_nanogpt(found, mfu))
        seconds = (time.monotonic() - started) * (1.0 if number else LATER_ROUND)
    return _beside_nanogpt(found, mfu)


def _keys_beside_nanogpt(bench: Bench, size: str) -> list[str]:
    keys = ["compile=true", "precision=bf16"]
    if bench.on_gpu:
        return [*keys, f"micro_batch={bench.sizes.sequences}", f"batch_tokens={bench.batch_tokens}"]
    _, sequences, context = STEPS[size]  # the sizes of nanogpt_step.py
    return [*keys, f"micro_batch={sequences}", f"context={context}", f"batch_tokens={sequences * context}"]


def _beside_nanogpt(found: Mapping[str, list[float]], mfu: Mapping[str, float | None]) -> str:
    """Format the median of each side, its range, its MFU and the ratio to nanoGPT's, where these are known."""
    parts, theirs = [], statistics.median(found["nanoGPT"]) if found["nanoGPT"] else None
    for name, speeds in found.items():
        if speeds:
            median = statistics.median(speeds)
            of_one = mfu.get(name)
            share = f", MFU {median * of_one:.1%}" if of_one else ""
            ratio = f": {median / theirs:.2f} ×" if name in mfu and theirs else ""
            parts.append(f"{name} {median:,.0f} ({min(speeds):,.0f}–{max(speeds):,.0f}{share}){ratio}")
    return f"tokens/s: {'; '.join(parts)}; {len(found['nanoGPT'])} rounds"


def profile(bench: Bench) -> str:
    """Profile three steps of the small model and return the milliseconds of a step by kind of kernel."""
    sizes = bench.sizes
    keys = [f"micro_batch={sizes.sequences}", f"batch_tokens={bench.batch_tokens}", "precision=bf16", "compile=true"]
    name, steps = "profiled", 3
    arguments = [*bench.on_corpus(sizes.models[0], sizes.steps), *keys, "optimizer=adamw"]
    bench.train(name, [*arguments, f"profile={sizes.steps - steps}:{steps}"])
    folder = bench.folder / name / "profile"
    if bench.on_gpu and not (folder / "memory-rank0.pickle").exists():
        raise RuntimeError("the profile has no memory snapshot")
    with gzip.open(folder / "trace-rank0.json.gz", "rt", encoding="utf-8") as file:
        return summarize_trace(json.load(file)["traceEvents"], steps)


def summarize_trace(events: list[dict[str, Any]], steps: int) -> str:
    """Return the milliseconds per step of all kernels, of each kind, and of the five longest."""
    kinds: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            name = event["name"]
            kind = next((kind for part, kind in KERNELS.items() if part in name.lower()), OTHER_KERNELS)
            kinds[kind] += event["dur"] / 1e3 / steps
            kernels[name] += event["dur"] / 1e3 / steps
    if not kernels:
        return "no kernels of a GPU"
    by_time = sorted(kinds.items(), key=lambda item: -item[1])
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:5]
    busy = f"{sum(kinds.values()):.1f} ms of kernels in a step: " + ", ".join(f"{k} {ms:.1f}" for k, ms in by_time)
    return f"{busy}; the longest: " + ", ".join(f"{name[:60]} {ms:.2f}" for name, ms in longest)


def compare_with_trl(bench: Bench, trl_python: str | None) -> str:
    """Compare a step of distilling medium to small (JSD, bf16) with GKDTrainer, TRL's chunked loss and Liger's.

    A side that fails does not hide the others.
    """
    if trl_python is None:
        raise NotRun("--trl-python is not given")
    sizes, batch = bench.sizes, max(bench.sizes.sequences // 2, 1)
    keys = ["task=distill", f"teacher={bench.random_teacher()}", "preflight=off", "loss=jsd", "loss.beta=0.5"]
    keys += ["loss.hard_weight=0", "optimizer=adamw", "precision=bf16", "compile=true"]
    keys += [f"micro_batch={batch}", f"batch_tokens={batch * sizes.context}"]
    report = bench.train("beside-trl", [*bench.on_corpus(sizes.models[0], sizes.steps), *keys])
    ours = report["tokens_per_second"], report["peak_memory_bytes"] / 2**30
    results = [f"{ours[0]:,.0f} tokens/s, {ours[1]:.1f} GiB"]
    bench.note(results[0])
    layers, heads, width = sizes.student
    given = {"corpus": bench.folder / "corpus", "tokenizer": bench.folder / "tokenizer", "beta": 0.5, "steps": 30}
    given |= {"layers": layers, "heads": heads, "width": width, "batch": batch, "precision": "bf16"}
    given |= {"teacher": bench.random_teacher(), "threads": 8 if bench.on_gpu else 1}
    sides = {"compiled": LOOPS["compiled"], "gkd": LOOPS["gkd"]} | ({"liger": LIGER} if bench.on_gpu else {})
    failed = []
    for loop, title in sides.items():
        context = sizes.context - (loop == "gkd")  # GKDTrainer adds a prompt token
        try:
            found = trl_step(trl_python, {**given, "loop": loop, "context": context}, timeout=bench.seconds_left)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            failed.append(f"{title} failed: {' '.join(str(error).split())[-200:]}")
            continue
        theirs = found["targets"] / found["milliseconds"] * 1e3, found["peak"] / 2**30
        ratios = f"{ours[0] / theirs[0]:.2f} × the speed, {ours[1] / theirs[1]:.2f} × the memory"
        results.append(f"{title}: {theirs[0]:,.0f} tokens/s, {theirs[1]:.1f} GiB; ours {ratios}")
        bench.note("; ".join(results))
    if failed:
        raise RuntimeError("; ".join([*results, *failed]))
    return "; ".join(results)


def checkpoints(bench: Bench) -> str:
    """Compare the small model's training with a checkpoint every 100 steps, and with one at the end alone."""
    sizes, seconds = bench.sizes, {}
    every = 100 if bench.on_gpu else sizes.steps
    keys = [f"micro_batch={sizes.sequences}", f"batch_tokens={bench.batch_tokens}", "compile=true"]
    for name, saved in (("without", 4 * every), ("with", every)):
        arguments = [*bench.on_corpus(sizes.models[0], 4 * every), *keys, f"checkpoint_every={saved}"]
        seconds[name] = seconds_of_steps(bench.train(f"checkpoints-{name}", arguments))
    longer = seconds["with"] / seconds["without"] - 1
    return f"{seconds['with']:.1f} s with one every {every} steps, {seconds['without']:.1f} s without: {longer:+.1%}"


def distil_with_defaults(bench: Bench, *options: str) -> str:
    """Run the command of docs/distillation.md, task=distill model=small with a medium teacher, for 20 steps."""
    usual = ["task=distill", f"model={bench.sizes.models[0]}", f"teacher={bench.random_teacher()}", "steps=20"]
    return _speed(bench.train("defaults", [*usual, "preflight=off", *options]))


def experiment(bench: Bench) -> str:
    """Train a small teacher on the source of PyTorch's packages, then the student with and without it at equal tokens.

    All installed packages (data=packages) would take minutes to tokenize.
    """
    sizes, small = bench.sizes, bench.sizes.models[0]
    tokens = 4 * bench.batch_tokens
    source = Path(torch.__file__).parents[1] / "torch*" / "**" / "*.py"
    usual = [*(["data=text", f"path={source}"] if bench.on_gpu else ["data=stdlib"]), f"context={sizes.context}"]
    usual += [f"batch_tokens={tokens}", f"micro_batch={sizes.sequences}", "callbacks=minimal", "log_every=20"]
    usual += ["precision=bf16"] if bench.on_gpu else ["validate_tokens=4096"]

    found: list[str] = []

    def score(name: str, share: float, keys: list[str]) -> float:
        steps = max(round(share * sizes.budget / tokens), 2)
        loss = bench.train(f"experiment-{name}", [*usual, *bench.of_length(steps), *keys])["val_loss"]
        found.append(f"{name} {loss:.3f} after {steps * tokens:,} tokens")
        bench.note(f"val/loss: {', '.join(found)}")
        return loss

    shape = ["model=distil"] if bench.on_gpu else [f"model={small}", "model.n_layer=1"]
    teacher = score("teacher", 1.0, [f"model={small}"])
    distil = ["task=distill", f"teacher={bench.folder / 'experiment-teacher'}", "preflight=warn", "loss.hard_weight=0"]
    with_teacher, alone = score("kd", 0.5, [*shape, *distil]), score("ce", 0.5, shape)
    closed = (alone - with_teacher) / (alone - teacher)
    losses = f"val/loss: teacher {teacher:.3f}, student with it {with_teacher:.3f}, without {alone:.3f}"
    return f"{losses} on {sizes.budget // 2:,} tokens each; {closed:.0%} of the gap closed"
