"""Ranks: time and memory of text generation and of Muon's step in a run on several CPU ranks.

    python -m benchmarks.benchmark_ranks [--model small] [--precision bf16] [--devices 2] [--strategy fsdp]

A run of a few steps with a callback that times both on each rank. The model has random weights, because only its size
matters. Memory is the peak of a rank's resident set during the call, above its resident set before it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
import torch

from benchmarks.synthetic_corpus import write_data
from benchmarks.train_command import of_length, run_train
from gpt2lab.settings import GREEDY
from gpt2lab.system.device import peak_memory_bytes, reset_peak_memory
from gpt2lab.system.malloc_tuning import release_freed_memory

VOCABULARY, CONTEXT, STEPS = 4096, 256, 5
TIMEOUT = 900  # seconds


class RankTimes(lightning.Callback):
    """Times generation after the first step and every optimizer step after it, and writes them for each rank.

    Args:
        folder: for the files, rank-N.json.
        prompts: number of prompts.
        tokens: new tokens of each.
    """

    def __init__(self, folder: str, prompts: int, tokens: int) -> None:
        self.folder, self.prompts, self.tokens = Path(folder), prompts, tokens
        self._started = 0.0
        self._muon: list[float] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        optimizer.register_step_pre_hook(lambda *_: self._start())
        optimizer.register_step_post_hook(lambda *_: self._muon.append(time.perf_counter() - self._started))

    def _start(self) -> None:
        torch.distributed.barrier()
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != STEPS or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        prompts = [f"w{number} w{number + 1} w{number + 2}" for number in range(self.prompts)]
        release_freed_memory()  # which would hide what the call allocates
        torch.distributed.barrier()
        before, start = reset_peak_memory(torch.device("cpu")), time.perf_counter()
        texts = pl_module.generate(prompts, GREEDY, self.tokens)
        seconds = time.perf_counter() - start
        found = {
            "generation_seconds": seconds,
            "generation_bytes": peak_memory_bytes(torch.device("cpu")) - before,
            "muon_seconds": statistics.median(self._muon[1:]),
            "texts": texts,
        }
        (self.folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(found))


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Train and return the figures of each rank."""
    data = write_data(folder, VOCABULARY, train_tokens=100_000, val_tokens=2 * CONTEXT)
    keys = [f"model={options.model}", *data, f"context={CONTEXT}", *of_length(STEPS)]
    keys += [f"precision={options.precision}", f"devices={options.devices}", f"strategy={options.strategy}"]
    keys += ["accelerator=cpu", "optimizer=muon", "compile=false"]
    keys += [f"batch_tokens={options.devices * CONTEXT}", "micro_batch=1", "logger=none", "callbacks=minimal"]
    keys += ["+callbacks.times._target_=benchmarks.benchmark_ranks.RankTimes"]
    given = {"folder": folder, "prompts": options.prompts, "tokens": options.tokens}
    keys += [f"+callbacks.times.{name}={value}" for name, value in given.items()]
    run_train([*keys, f"run_dir={folder / 'run'}"], TIMEOUT)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(options.devices)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--strategy", default="fsdp", choices=("ddp", "fsdp"))
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        ranks = measure(options, Path(scratch))
    print("| model | precision | strategy | generation, s | its memory per rank, MB | Muon's step, s |")
    print("|---|---|---|--:|--:|--:|")
    slowest = {name: max(rank[name] for rank in ranks) for name in ranks[0] if name != "texts"}
    print(
        f"| {options.model} | {options.precision} | {options.strategy} | {slowest['generation_seconds']:.1f} "
        f"| {slowest['generation_bytes'] / 1e6:,.0f} | {slowest['muon_seconds']:.2f} |"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
