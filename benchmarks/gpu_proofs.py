"""Checks of gpu_check.py that a GPU trains as promised: resume, determinism, precisions, FSDP, and the playground.

Each returns its result as text and raises RuntimeError if the claim is violated.
"""

import json
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import benchmark_precisions
from benchmarks.benchmark_precisions import EXACT, OTHERS
from benchmarks.gpu_bench import Bench
from benchmarks.train_command import ROOT

SAME_LOSS = 0.02  # nats: FSDP compared with one device
SAME_RESUMED = 1e-3  # nats: without trainer.deterministic GPU kernels are not
DETERMINISTIC = "trainer.deterministic=true"
STOP_SECONDS = 5.0  # for the playground to end


def fsdp_on_one_gpu(bench: Bench) -> str:
    """Check that 30 steps have the same loss with FSDP (on one GPU) and without."""

    def run(strategy: str) -> float:
        arguments = [*bench.on_corpus(bench.sizes.models[0], 30), "compile=false", f"strategy={strategy}"]
        return bench.train(f"strategy-{strategy}", arguments)["val_loss"]

    with ThreadPoolExecutor() as pool:
        unsharded, sharded = pool.map(run, ("auto", "fsdp"))
    if not abs(unsharded - sharded) < SAME_LOSS:
        raise RuntimeError(f"val/loss {unsharded:.4f} unsharded, {sharded:.4f} sharded")
    return f"val/loss {sharded:.4f}, unsharded {unsharded:.4f}"


def resume_after_a_kill(bench: Bench) -> str:
    """Check a run that is killed (SIGKILL) after its first checkpoint and resumed against an uninterrupted one."""
    arguments = [*bench.on_corpus(bench.sizes.models[2], 150), "compile=false", "checkpoint_every=50"]
    unbroken = bench.train("unbroken", arguments)["val_loss"]
    run_dir = bench.folder / "killed"
    kill_at_first_checkpoint(bench, arguments, run_dir)
    bench.resume(run_dir)
    loss = json.loads((run_dir / "report.json").read_text())["val_loss"]
    if not abs(loss - unbroken) < SAME_RESUMED:
        raise RuntimeError(f"val/loss {loss:.5f} resumed, {unbroken:.5f} uninterrupted")
    return f"val/loss differs from the uninterrupted run's by {abs(loss - unbroken):.1e}"


def deterministic(bench: Bench, options: Sequence[str]) -> str:
    """Check that deterministic runs end with the same bytes, one of them killed (SIGKILL) and resumed.

    They generate samples too: PyTorch has no deterministic algorithm for nucleus sampling on a GPU.
    """
    name = "-".join(["deterministic", *(option.split("/")[-1] for option in options)]).replace("=", "-")
    usual = [*bench.on_corpus(bench.sizes.models[2], 60), "checkpoint_every=20", "callbacks=default", *options]
    usual += ["callbacks.checkpoint.verify_export=false", "callbacks.samples.max_new_tokens=16", "sample_every=60"]
    arguments, names = [*usual, DETERMINISTIC], [f"{name}-{run}" for run in ("first", "second", "killed")]
    usual_speed = bench.train(f"{name}-usual", usual)["tokens_per_second"]
    speed = bench.train(names[0], arguments)["tokens_per_second"]
    bench.note(f"{speed / usual_speed:.2f} × the usual tokens/s")
    first, second, killed = (bench.folder / one for one in names)
    with ThreadPoolExecutor() as pool:  # their speed is not measured
        unbroken = pool.submit(bench.train, names[1], arguments)
        kill_at_first_checkpoint(bench, arguments, killed)
        bench.resume(killed)
        unbroken.result()
    for other in (second, killed):
        for file in ("hf/model.safetensors", "samples.jsonl"):
            if (first / file).read_bytes() != (other / file).read_bytes():
                raise RuntimeError(f"{file} of {other.name} and {first.name} differ")
    return f"three runs bitwise equal, one after SIGKILL; {speed / usual_speed:.2f} × the usual tokens/s"


def deterministic_distillation(bench: Bench) -> str:
    """Check that deterministic distillation from a teacher with random weights ends with the same bytes."""
    teacher = ("task=distill", f"teacher={bench.random_teacher()}", "preflight=off", "compile=false")
    return deterministic(bench, teacher)


def precisions(bench: Bench) -> str:
    """Check each precision against fp32 with the same seeds: nano, 300 steps on the standard library."""
    device = bench.sizes.accelerator
    losses = benchmark_precisions.measure_losses(bench.folder, device, at_once=len(OTHERS[device]) + 1)
    results, wrong = [f"fp32 {statistics.mean(losses[EXACT].values()):.3f}"], []
    for name, found in benchmark_precisions.compare_with_exact(losses).items():
        results.append(f"{name} {found.mean:+.4f} ({', '.join(f'{d:+.4f}' for d in found.differences.values())})")
        if not benchmark_precisions.is_within(found):
            wrong.append(name)
    if wrong:
        raise RuntimeError("val/loss: " + "; ".join(results))
    return "val/loss: " + "; ".join(results)


def playground(bench: Bench) -> str:
    """Start generate.py serve=true and return the tokens/s of a streamed text.

    The model is the teacher of the experiment, or one with random weights.
    """
    run_dir = bench.folder / "experiment-teacher"
    checkpoint = run_dir if (run_dir / "report.json").exists() else bench.random_teacher()
    command = [sys.executable, "generate.py", f"checkpoint={checkpoint}", "serve=true", "port=0"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        address = _address(server.stdout)
        content = json.dumps({"prompt": "def add(a, b):\n", "max_new_tokens": 100}).encode()
        request = urllib.request.Request(f"{address.rstrip('/')}/write", content, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=bench.seconds_left) as answer:
            events = [json.loads(line) for line in answer]
    finally:
        server.terminate()
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
    if not events or "error" in events[-1]:
        raise RuntimeError(f"the playground answered {events[-1:]}")
    return f"{len(events)} events; the last: {json.dumps(events[-1])[:200]}"


def _address(lines: Iterable[str]) -> str:
    """Return the address in a server's output."""
    printed = []
    for line in lines:
        printed.append(line)
        for word in line.split():
            if word.startswith("http://"):
                return word
    raise RuntimeError(f"the playground ended before it had an address: {''.join(printed)[-400:]}")


def kill_at_first_checkpoint(bench: Bench, arguments: list[str], run_dir: Path) -> None:
    command = [sys.executable, "train.py", *arguments, f"run_dir={run_dir}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (run_dir / "checkpoints" / "last").exists():
            if process.poll() is not None or time.monotonic() > bench.deadline:
                raise RuntimeError("the run ended, or its time, before it saved a checkpoint")
            time.sleep(0.05)
    finally:
        process.kill()
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError("the run ended before it was killed")
