"""What this project claims of a GPU, checked in twenty minutes on one: `make gpu-check`.

    python -m benchmarks.gpu_check

Speed, MFU and memory of small and medium, eager and compiled, bf16 and fp16; flash attention; FSDP on one GPU; resume
after a kill. Every training is a run of train.py. The table is appended to benchmarks/RESULTS.md with date and device.
Without a GPU it says so and ends well.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.synthetic_corpus import write_corpus, write_tokenizer
from benchmarks.train_command import ROOT, bin_data, train

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
MINUTES = 20
VOCABULARY = 50_257
CONTEXT = 1024
BATCH_TOKENS = 32 * CONTEXT
SAME_LOSS = 0.02  # nats: FSDP against one device, bf16, after 30 steps
SAME_RESUMED = 1e-3  # nats: GPU kernels need not give the same bytes twice


@dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[Path], str]  # folder for runs → what came out; raises when the claim does not hold


def base(folder: Path, model: str, steps: int) -> list[str]:
    quiet = [f"{key}_every={steps}" for key in ("validate", "checkpoint", "sample")]
    sizes = [f"context={CONTEXT}", f"batch_tokens={BATCH_TOKENS}", f"steps={steps}", "log_every=5"]
    data = bin_data(folder / "corpus", folder / "tokenizer")
    return ["task=pretrain", f"model={model}", *data, *sizes, *quiet, "accelerator=gpu", "devices=1", "logger=csv"]


def speed(model: str, micro_batch: int, *options: str) -> Callable[[Path], str]:
    """A check that trains 40 steps and tells speed, MFU and memory."""

    def run(folder: Path) -> str:
        run_dir = folder / "-".join([model, *options]).replace("=", "-")
        report = train(run_dir, [*base(folder, model, 40), f"micro_batch={micro_batch}", *options], timeout=400)
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        if not report["train_loss"] < 12:
            raise RuntimeError(f"training loss {report['train_loss']}")
        memory = report["peak_memory_bytes"] / 2**30
        return f"{report['tokens_per_second']:,.0f} tokens/s, MFU {report['mfu']:.1%}, {memory:.1f} GiB"

    return run


def flash_attention(folder: Path) -> str:
    """Forward and backward with every other attention kernel forbidden, in bf16 and fp16."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from gpt2lab.backbone import Backbone
    from gpt2lab.settings import ModelShape

    backbone = Backbone(ModelShape(n_layer=2, n_head=12, n_embd=768, vocab_size=VOCABULARY)).cuda()
    ids = torch.randint(VOCABULARY, (2, CONTEXT), device="cuda")  # (B, T)
    differences = []
    for dtype in (torch.bfloat16, torch.float16):
        hidden = []
        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            with sdpa_kernel(kernel), torch.autocast("cuda", dtype=dtype):
                hidden.append(backbone(ids, lambda hidden, weight: hidden))  # (B, T, D)
            hidden[-1].float().square().mean().backward()
        differences.append((hidden[0] - hidden[1]).float().abs().max().item())
    if max(differences) > 0.1:
        raise RuntimeError(f"hidden states differ from the plain kernel's by {max(differences):.3f}")
    return f"runs; largest difference from the plain kernel {max(differences):.3f}"


def fsdp_on_one_gpu(folder: Path) -> str:
    """The same 30 steps sharded (over one GPU) and not: the same loss."""
    losses = []
    for strategy in ("auto", "fsdp"):
        arguments = [*base(folder, "small", 30), "micro_batch=8", "compile=false", f"strategy={strategy}"]
        losses.append(train(folder / f"strategy-{strategy}", arguments, timeout=400)["val_loss"])
    if abs(losses[0] - losses[1]) > SAME_LOSS:
        raise RuntimeError(f"val/loss {losses[0]:.4f} unsharded, {losses[1]:.4f} sharded")
    return f"val/loss {losses[1]:.4f}, unsharded {losses[0]:.4f}"


def resume_after_a_kill(folder: Path) -> str:
    """Kill −9 once the first checkpoint is saved, resume, compare with an unbroken run."""
    arguments = [*base(folder, "mini", 200), "micro_batch=32", "compile=false", "checkpoint_every=50"]
    unbroken = train(folder / "unbroken", arguments, timeout=300)["val_loss"]
    run_dir = folder / "killed"
    command = [sys.executable, "train.py", *arguments, f"run_dir={run_dir}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (run_dir / "checkpoints" / "last").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError("the run ended before it saved a checkpoint")
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = [sys.executable, "train.py", f"resume={run_dir}"]
    ended = subprocess.run(resumed, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    if ended.returncode:
        raise RuntimeError(f"resuming ended with exit code {ended.returncode}: {ended.stderr[-300:]}")
    loss = json.loads((run_dir / "report.json").read_text())["val_loss"]
    if abs(loss - unbroken) > SAME_RESUMED:
        raise RuntimeError(f"val/loss {loss:.5f} resumed, {unbroken:.5f} unbroken")
    return f"val/loss differs from the unbroken run's by {abs(loss - unbroken):.1e}"


def checks() -> Iterator[Check]:
    yield Check("flash attention", flash_attention)
    yield Check("small, bf16, eager", speed("small", 16, "precision=bf16", "compile=false"))
    yield Check("small, bf16, compiled", speed("small", 16, "precision=bf16", "compile=true"))
    yield Check("small, fp16, compiled", speed("small", 16, "precision=fp16", "compile=true"))
    yield Check("medium, bf16, compiled", speed("medium", 8, "precision=bf16", "compile=true"))
    recomputed = ("precision=bf16", "compile=false", "activation_checkpointing=true")
    yield Check("medium, bf16, activations recomputed", speed("medium", 16, *recomputed))
    yield Check("FSDP on one GPU", fsdp_on_one_gpu)
    yield Check("resume after kill -9", resume_after_a_kill)


def outcome(check: Check, folder: Path) -> tuple[str, str]:
    """("passed" | "FAILED", what came out)."""
    try:
        return "passed", check.run(folder)
    except (RuntimeError, OSError, KeyError, ValueError, subprocess.TimeoutExpired) as error:
        return "FAILED", " ".join(str(error).split())[-300:]


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu-check: not run on a GPU: PyTorch finds none here.")
        return 0
    device = torch.cuda.get_device_name()
    heading = f"\n## {time.strftime('%Y-%m-%d')}, {device}, torch {torch.__version__}\n\n"
    verdicts, table = [], "| check | | result |\n|---|---|---|\n"
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_corpus(folder / "corpus", VOCABULARY, train_tokens=4_000_000, val_tokens=64 * CONTEXT)
        write_tokenizer(folder / "tokenizer", VOCABULARY)
        for check in checks():
            late = time.monotonic() - started > MINUTES * 60
            verdict, result = ("not run", f"{MINUTES} minutes were over") if late else outcome(check, folder)
            row = f"| {check.name} | {verdict} | {result.replace('|', '/')} |\n"
            print(row, end="", flush=True)
            verdicts.append(verdict)
            table += row
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(heading + table)
    return 1 if "FAILED" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
