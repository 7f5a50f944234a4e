"""Training step of nanoGPT's model file, for comparison; its code is loaded from a checkout.

    python -m benchmarks.nanogpt_step --model /path/to/nanoGPT/model.py --corpus DIR --vocab 4096 [--compile] [--tuned]

Prints one JSON object: {"tokens_per_second": …}. The step is nanoGPT's train.py: bf16 autocast, AdamW (fused on a GPU
alone), clipping at 1.0, random batches from train.bin, on a GPU copied from pinned memory. As there, the CPU does not
wait for the GPU after every step, but every few steps, as often as train.py logs beside it. --tuned adds what our
train.py does on a CPU and nanoGPT's does not: fused AdamW and reuse of freed memory.
"""

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from benchmarks.shape import STEPS
from gpt2lab.system.device import resolve_device, synchronize
from gpt2lab.system.malloc_tuning import keep_freed_memory
from launch.run.auto_settings import cpu_cores

STEPS_OF_AN_INTERVAL = {"cuda": 5, "cpu": 1}  # timed together


def load_model_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


def random_batch(tokens: np.ndarray, batch_size: int, context: int, device: torch.device) -> torch.Tensor:
    """Return a batch (B, T + 1) on the device."""
    starts = torch.randint(len(tokens) - context, (batch_size,))
    rows = [tokens[start : start + context + 1].astype(np.int64) for start in starts.tolist()]
    batch = torch.from_numpy(np.stack(rows))
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)


def step_seconds(options: argparse.Namespace) -> list[float]:
    """Measure the seconds of an optimizer step of one batch, a mean for each interval."""
    shape, batch_size, context = STEPS[options.size]
    nanogpt = load_model_file(options.model)
    device = resolve_device("auto")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as its train.py allows
    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "block_size": shape.n_positions}
    model = nanogpt.GPT(nanogpt.GPTConfig(vocab_size=options.vocab, dropout=0.0, bias=True, **sizes)).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
    if options.tuned:
        groups = [{key: group[key] for key in ("params", "weight_decay")} for group in optimizer.param_groups]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    step_model = torch.compile(model) if options.compile else model
    tokens = np.memmap(options.corpus / "train.bin", dtype=np.uint16, mode="r")
    seconds, length = [], STEPS_OF_AN_INTERVAL[device.type]
    synchronize(device)
    started = time.perf_counter()
    for step in range(1, options.steps + 1):
        batch = random_batch(tokens, batch_size, context, device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            _, loss = step_model(batch[:, :-1], batch[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % length == 0:
            synchronize(device)
            seconds.append((time.perf_counter() - started) / length)
            started = time.perf_counter()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--vocab", type=int, required=True)
    parser.add_argument("--size", choices=STEPS, default="mini")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tuned", action="store_true", help="fused AdamW, freed memory reused")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(cpu_cores())
    if options.tuned and not keep_freed_memory():
        raise SystemExit("This C library has no mallopt.")
    with contextlib.redirect_stdout(sys.stderr):  # the model file prints what it does
        seconds = step_seconds(options)
    timed = seconds[len(seconds) // 4 :]  # without warm-up
    _, batch_size, context = STEPS[options.size]
    print(json.dumps({"tokens_per_second": batch_size * context / statistics.median(timed)}))


if __name__ == "__main__":
    main()
