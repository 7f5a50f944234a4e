"""CPU training step: effect of reused memory, attention of short sequences, compiled GELU and compiled blocks.

    python -m benchmarks.benchmark_cpu_step

Model mini, 8 sequences of 256 tokens, bf16 autocast, AdamW; the LM head is always compiled. Cases alternate in new
processes; times are medians over processes of the median step, memory is the largest resident set.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from benchmarks.alternation import alternate
from benchmarks.shape import BATCH, CONTEXT, SHAPES
from benchmarks.train_command import run_module
from gpt2lab.losses.lm_head_loss import LMHeadLoss, lm_head_loss
from gpt2lab.model.backbone import Backbone
from gpt2lab.optim.optimizers import build_optimizer
from gpt2lab.settings import OptimizerSettings
from gpt2lab.system.device import peak_memory_bytes
from gpt2lab.system.malloc_tuning import keep_freed_memory
from launch.run.auto_settings import cpu_cores

VOCABULARIES = (4_096, 50_257)
CASES = {
    "as PyTorch comes": "sdpa",
    "freed memory reused": "sdpa reuse",
    "and attention of short sequences": "reuse",
    "and GELU compiled": "reuse gelu",
    "or the blocks compiled": "reuse compile",
}
WARM_UP, STEPS = 5, 20


def step_milliseconds(vocab_size: int, options: str) -> float:
    """Return the median of STEPS optimizer steps."""
    torch.manual_seed(0)
    backbone = Backbone(replace(SHAPES["mini"], vocab_size=vocab_size)).train()
    if "sdpa" in options:
        backbone.lm.config._attn_implementation = "sdpa"
    if "gelu" in options:
        backbone.compile_gelu()
    if "compile" in options:
        backbone.compile_blocks()
    optimizer = build_optimizer(backbone.named_parameters(), OptimizerSettings("adamw", 1e-3, 0.1), fused=True)
    tokens = torch.randint(vocab_size, (BATCH, CONTEXT + 1))  # (B, T + 1)
    labels = tokens[:, 1:].flatten()  # (B·T,)

    def head(hidden: torch.Tensor, weight: torch.Tensor) -> LMHeadLoss:
        return lm_head_loss(hidden.flatten(0, 1), weight, labels, compiled=True)

    seconds = []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = backbone(tokens[:, :-1], head)
        (result.total / len(labels)).backward()
        nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP:]) * 1e3


def measure_here(vocab_size: int, options: str) -> None:
    torch.set_num_threads(cpu_cores())
    if "reuse" in options and not keep_freed_memory():
        raise SystemExit("This C library has no mallopt; there is nothing to compare.")
    milliseconds = step_milliseconds(vocab_size, options)
    print(json.dumps({"milliseconds": milliseconds, "memory": peak_memory_bytes(torch.device("cpu"))}))


def measure_apart(vocab_size: int, options: str) -> dict[str, float]:
    return run_module("benchmark_cpu_step", "--here", json.dumps([vocab_size, options]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--here", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        return measure_here(*options.here)
    print("| vocabulary | | step, ms | ÷ as PyTorch comes | peak memory, GB |\n|--:|---|--:|--:|--:|")
    for vocab_size in VOCABULARIES:
        sides = {name: partial(measure_apart, vocab_size, case) for name, case in CASES.items()}
        found = alternate(sides, options.rounds)
        times = {name: statistics.median(one["milliseconds"] for one in several) for name, several in found.items()}
        for name, several in found.items():
            ratio, memory = times[name] / times["as PyTorch comes"], max(one["memory"] for one in several) / 1e9
            print(f"| {vocab_size:,} | {name} | {times[name]:.0f} | {ratio:.2f} | {memory:.2f} |", flush=True)
    return None


if __name__ == "__main__":
    main()
