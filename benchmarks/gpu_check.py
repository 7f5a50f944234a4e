"""GPU check: verify the project's claims about GPUs in about twenty minutes: `make gpu-check`.

    python -m benchmarks.gpu_check [--nanogpt /path/to/nanoGPT] [--trl-python PYTHON] [--only WORD,WORD]

Attention kernels, packing and the LM-head loss; speed, MFU and memory of small and medium; precisions; FSDP on one GPU;
resume after a kill; bitwise equal runs with trainer.deterministic; comparisons with nanoGPT, TRL and Liger, if
available. The table is appended to benchmarks/RESULTS.md with date and device. Without a GPU nothing is checked and the
exit code is 0.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import gpu_kernels, gpu_runs
from benchmarks.benchmark_training_step import find_model_file
from benchmarks.synthetic_corpus import write_corpus, write_tokenizer
from benchmarks.train_command import ROOT

RESULTS = ROOT / "benchmarks" / "RESULTS.md"


@dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[Path], str]  # folder for runs → result; raises if the claim is violated


def checks(nanogpt: Path | None, trl_python: str | None) -> Iterator[Check]:
    yield Check("flash attention", lambda _: gpu_kernels.flash_attention())
    yield Check("packed documents", lambda _: gpu_kernels.packing(prefix=False))
    yield Check("packed prefixes", lambda _: gpu_kernels.packing(prefix=True))
    yield Check("LM-head loss, 16,384 positions, V = 50,257", lambda _: gpu_kernels.compare_lm_head_losses())
    if nanogpt is not None:
        yield Check("small vs. nanoGPT", gpu_runs.compare_with_nanogpt(find_model_file(nanogpt)))
    if trl_python is not None:
        yield Check("distillation, medium to small, vs. TRL", gpu_runs.compare_with_trl(trl_python))
    speed = gpu_runs.speed
    yield Check("small, bf16, compiled", speed("small", 16, "precision=bf16", "compile=true"))
    yield Check("small, bf16, eager", speed("small", 16, "precision=bf16", "compile=false"))
    yield Check("precisions", gpu_runs.precisions)
    yield Check("distillation, medium to small, default values", gpu_runs.distil_with_defaults)
    yield Check("resume after kill -9", gpu_runs.resume_after_a_kill)
    yield Check("deterministic, compiled", gpu_runs.deterministic("compile=true"))
    yield Check("deterministic, eager, packed documents", gpu_runs.deterministic("compile=false", "packing=true"))
    yield Check("deterministic distillation", gpu_runs.deterministic_distillation)
    yield Check("FSDP on one GPU", gpu_runs.fsdp_on_one_gpu)
    yield Check("medium, bf16, compiled", speed("medium", 16, "precision=bf16", "compile=true"))
    recomputed = ("precision=bf16", "compile=false", "activation_checkpointing=true")
    yield Check("medium, bf16, activations recomputed", speed("medium", 16, *recomputed, steps=20))
    yield Check("small, fp16, eager", speed("small", 16, "precision=fp16", "compile=false"))


def outcome(check: Check, folder: Path) -> tuple[str, str]:
    """Return ("passed" | "FAILED", result)."""
    try:
        return "passed", check.run(folder)
    except (RuntimeError, OSError, KeyError, ValueError, subprocess.TimeoutExpired) as error:
        return "FAILED", " ".join(str(error).split())[-600:]
    finally:
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="a nanoGPT checkout, or its model.py")
    parser.add_argument("--trl-python", help="the Python of an environment that has TRL")
    parser.add_argument("--only", default="", help="checks that have one of these words in their names")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: skipped, because PyTorch finds no GPU.")
        return 0
    device = torch.cuda.get_device_name()
    heading = f"\n## {time.strftime('%Y-%m-%d')}, {device}, torch {torch.__version__}\n\n"
    verdicts, table = [], "| check | | result | s |\n|---|---|---|--:|\n"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_corpus(folder / "corpus", gpu_runs.VOCABULARY, train_tokens=4_000_000, val_tokens=64 * gpu_runs.CONTEXT)
        write_tokenizer(folder / "tokenizer", gpu_runs.VOCABULARY)
        for check in checks(options.nanogpt, options.trl_python):
            if not any(word in check.name for word in options.only.split(",")):
                continue
            started = time.monotonic()
            verdict, result = outcome(check, folder)
            seconds = time.monotonic() - started
            row = f"| {check.name} | {verdict} | {result.replace('|', '/')} | {seconds:.0f} |\n"
            print(row, end="", flush=True)
            verdicts.append(verdict)
            table += row
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(heading + table)
    return 1 if "FAILED" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
