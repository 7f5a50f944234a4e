"""LM-head loss, forward and backward: gpt2lab compared with dense PyTorch, eager and compiled, and other kernels.

    python -m benchmarks.benchmark_lm_head_loss

N = 4,096 positions, V = 50,257, D = 384 and 768; cross-entropy, and forward KL to a teacher of the same width; fp32,
and bf16 autocast with probabilities in fp32. Times are medians over rounds in which the sides alternate in one process.
Memory is the peak above the inputs in a new process per side: the allocator's on a GPU; the resident set on a CPU, by
default and with freed memory reused, as in train.py. Prints a Markdown table.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.lm_head_sides import EAGER, OURS, Head, HeadInputs, Side, make_inputs, sides
from benchmarks.train_command import run_module
from gpt2lab.system.device import peak_memory_bytes, reset_peak_memory, resolve_device, synchronize
from gpt2lab.system.malloc_tuning import keep_freed_memory
from launch.run.auto_settings import cpu_cores, has_compiler

LOSSES, PRECISIONS, WIDTHS = ("cross_entropy", "forward_kl"), ("fp32", "bf16"), (384, 768)
ROWS, VOCABULARY, ROUNDS, WARM_UP = 4_096, 50_257, 5, 2
SAME = {"fp32": 1e-3, "bf16": 3e-2}  # norm of a gradient's difference from dense PyTorch's ÷ the norm of the latter
HEADING = f"""| loss | precision | D | side | ms | {OURS} ÷ it | memory, MB | {OURS} ÷ it | reused, MB | {OURS} ÷ it |
|---|---|--:|---|--:|--:|--:|--:|--:|--:|"""


@dataclass(frozen=True)
class Measured:
    milliseconds: float
    memory: int  # peak bytes above the inputs
    memory_kept: int  # the same with freed memory kept for reuse; on a GPU equal


def step(side: Side, head: Head, inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    """Compute the mean loss forward and backward; return the gradients of hidden states and head weight."""
    inputs.hidden.grad = inputs.weight.grad = None
    with torch.autocast(inputs.hidden.device.type, dtype=torch.bfloat16, enabled=head.precision == "bf16"):
        total = side(inputs)
    (total / len(inputs.labels)).backward()
    synchronize(inputs.hidden.device)
    assert inputs.hidden.grad is not None
    assert inputs.weight.grad is not None
    return inputs.hidden.grad, inputs.weight.grad


def times_here(head: Head, rounds: int, compiles: bool, refused: dict[str, str] | None = None) -> dict[str, float]:
    """Return median milliseconds by side.

    Args:
        refused: receives the error of each side that fails, which is then left out; None: it is raised.

    Raises:
        RuntimeError: a side's gradient differs from that of dense PyTorch.
    """
    device = resolve_device("auto")
    inputs, every = make_inputs(head, device), sides(head, device, compiles)
    right = step(every[EAGER], head, inputs)
    for name in list(every):
        try:
            _check_gradients(name, head, step(every[name], head, inputs), right)
        except Exception as error:  # of any library
            if refused is None:
                raise
            refused[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            del every[name]
    seconds = defaultdict(list)
    for number in range(WARM_UP + rounds):
        for name, side in every.items():
            started = time.perf_counter()
            step(side, head, inputs)
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(several) * 1e3 for name, several in seconds.items()}


def _check_gradients(name: str, head: Head, found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> None:
    for gradient, expected in zip(found, right, strict=True):
        difference = ((gradient - expected).norm() / expected.norm()).item()
        if not difference < SAME[head.precision]:
            raise RuntimeError(f"{name}, {head}: its gradient differs from dense PyTorch's by {difference:.1e}.")


def memory_here(head: Head, name: str, compiles: bool) -> int:
    """Return the peak bytes above the inputs of one side.

    A warm-up excludes libraries that a side loads at its first call. On a CPU it has a few rows, because memory that
    a whole step frees would hide the peak; on a GPU it is a whole step, which also excludes trial runs of kernels.
    """
    device = resolve_device("auto")
    side = sides(head, device, compiles)[name]
    if device.type == "cuda":
        step(side, head, make_inputs(head, device))
    else:
        few = replace(head, rows=8, vocab_size=64)
        step(side, few, make_inputs(few, device))
        torch.compiler.reset()  # compile for static sizes again
    inputs = make_inputs(head, device)
    before = reset_peak_memory(device)
    for _ in range(2):
        step(side, head, inputs)
    return peak_memory_bytes(device) - before


def apart(*job: object) -> Any:
    """Run `here` for this job in a new process and return its result."""
    return run_module("benchmark_lm_head_loss", "--here", json.dumps(job))


def here(what: str, head: dict, rounds: int, compiles: bool, keep: bool, name: str) -> None:
    torch.set_num_threads(cpu_cores())
    if keep:
        keep_freed_memory()
    if what == "times":
        print(json.dumps(times_here(Head(**head), rounds, compiles)))
    else:
        print(json.dumps(memory_here(Head(**head), name, compiles)))


def measure(head: Head, rounds: int, compiles: bool, reuse: bool = False) -> dict[str, Measured]:
    """Return time and memory by side.

    Args:
        reuse: whether freed memory is reused during timing.
    """
    sizes, found = asdict(head), {}
    on_cpu = resolve_device("auto").type == "cpu"
    for name, milliseconds in apart("times", sizes, rounds, compiles, reuse and on_cpu, "").items():
        memory = apart("memory", sizes, rounds, compiles, False, name)
        kept = apart("memory", sizes, rounds, compiles, True, name) if on_cpu else memory
        found[name] = Measured(milliseconds, memory, kept)
        print(f"{head} {name}: {milliseconds:.0f} ms, {memory / 1e6:.0f} MB, {kept / 1e6:.0f} MB", file=sys.stderr)
    return found


def markdown_rows(head: Head, found: dict[str, Measured]) -> str:
    """Format table rows; ratios are lm_head_loss to the side, below 1 if lm_head_loss is faster or smaller."""
    ours, rows = found[OURS], []
    for name, one in found.items():
        speed = f"{one.milliseconds:,.0f} | {ours.milliseconds / one.milliseconds:.2f}"
        memory = f"{one.memory / 1e6:,.0f} | {ours.memory / max(one.memory, 1):.2f}"
        kept = f"{one.memory_kept / 1e6:,.0f} | {ours.memory_kept / max(one.memory_kept, 1):.2f}"
        what = f"{head.loss.replace('_', ' ')} | {head.precision} | {head.width} | {name}"
        rows.append(f"| {what} | {speed} | {memory} | {kept} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--freed-memory-reused", action="store_true", help="during timing, by all sides")
    parser.add_argument("--tiny", action="store_true", help="takes seconds, without compilation; for tests")
    parser.add_argument("--here", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        return here(*options.here)
    heads = [Head(*kind, ROWS, VOCABULARY) for kind in product(options.losses, options.precisions, options.widths)]
    if options.tiny:
        heads = list(dict.fromkeys(replace(head, width=16, rows=32, vocab_size=64) for head in heads))
    compiles = has_compiler() and not options.tiny
    print(HEADING, flush=True)
    for head in heads:
        found = measure(head, options.rounds, compiles, reuse=options.freed_memory_reused)
        print(markdown_rows(head, found), flush=True)
    return None


if __name__ == "__main__":
    main()
