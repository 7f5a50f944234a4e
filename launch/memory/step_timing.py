"""Step timing: measures tokens per second of a few dummy steps on random tokens, in a subprocess.

python -m launch.memory.step_timing PARENT
    reads pickled sizes and run from stdin, prints seconds of a micro-batch and a step; it ends with process PARENT
"""

import json
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from launch.distributed import child_processes

if __name__ == "__main__":  # the imports below take seconds
    child_processes.die_with_parent(int(sys.argv[1]))

import torch

from gpt2lab.losses.dense_teacher import DenseTeacher
from gpt2lab.losses.lm_head_loss import lm_head_loss
from gpt2lab.model.backbone import Backbone
from gpt2lab.optim.optimizers import build_optimizer
from gpt2lab.storage.model_folder import matmul_parameter_count
from gpt2lab.system.determinism import use_deterministic_algorithms
from gpt2lab.system.device import flops_per_token, named_dtype, resident_memory_bytes, resolve_device, synchronize
from gpt2lab.system.malloc_tuning import keep_freed_memory
from launch.config import plugins
from launch.config.run_spec import RunSpec
from launch.memory.memory_plan import largest_that_fits, memory_plan
from launch.memory.memory_terms import RunSizes

STEPS = 3
TIMEOUT_SECONDS = 60.0
FLOP_LIMITS = {"cpu": 2e12}  # FLOP of the measurement, seconds on a slow device; limits the micro-batch
GPU_FLOP_LIMIT = 2e15


@dataclass(frozen=True)
class Speed:
    """Speed of one device.

    Attributes:
        tokens_per_second: None if it was not measured.
        note: how it was measured, or why not.
        decoding_seconds: time of a forward pass of one token of each text that is generated at once.
    """

    tokens_per_second: float | None
    note: str
    decoding_seconds: float = 0.0


def measure_speed(sizes: RunSizes, spec: RunSpec, free: int | None) -> Speed:
    """Time forward, backward and optimizer of a few micro-batches, with the teacher if each step runs it.

    Args:
        free: free bytes of the device; None: unknown.
    """
    machine = spec.machine
    rows = affordable_rows(sizes, FLOP_LIMITS.get(machine.accelerator, GPU_FLOP_LIMIT))
    if not rows:
        return Speed(None, "a few steps take too long on this device")
    rows = fitting_rows(sizes, rows, free, resident_memory_bytes())
    if not rows:
        return Speed(None, "one device has too little free memory to train the whole model")
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "launch.memory.step_timing", str(os.getpid())],
            env=child_processes.environment(),
            input=pickle.dumps((replace(sizes, rows=rows), spec)),
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Speed(None, f"{STEPS} micro-batches take more than {TIMEOUT_SECONDS:.0f} seconds")
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip() or "no message"
        return Speed(None, f"the steps failed: {message.splitlines()[-1][:60]}")
    seconds = json.loads(done.stdout.splitlines()[-1])
    micro_batches = -(-sizes.step_rows // rows)
    step_seconds = micro_batches * seconds["micro_batch"] + seconds["optimizer"]
    communication = ", without communication" if sizes.ranks > 1 else ""
    trained = ", training all weights" if sizes.lora_rank or sizes.frozen_layers else ""
    note = f"measured: {STEPS} micro-batches of {rows} × {sizes.length} random tokens, eager{trained}{communication}"
    return Speed(micro_batches * rows * sizes.length / step_seconds, note, seconds["decoding"])


def affordable_rows(sizes: RunSizes, flop: float) -> int:
    """Return the largest micro-batch, in sequences, whose measurement takes at most `flop` operations; 0 if none."""
    shape = sizes.shape
    per_token = flops_per_token(matmul_parameter_count(vars(shape)), shape.n_layer, shape.n_embd, sizes.length)
    if sizes.teacher:
        per_token += 2 * matmul_parameter_count(vars(sizes.teacher))
    return min(int(flop / (per_token * sizes.length * (1 + STEPS))), sizes.rows)


def fitting_rows(sizes: RunSizes, rows: int, free: int | None, process: int) -> int:
    """Return the largest micro-batch, up to `rows` sequences, whose dummy step fits into free memory; 0 if none.

    A dummy step may need more than a rank of the run: the model is not sharded, and all weights are trained.

    Args:
        free: free bytes of the device; None: unknown.
        process: bytes of a process before a model is built.
    """
    if free is None:
        return rows
    whole = replace(sizes, sharded=False, ranks=1, lora_rank=0, frozen_layers=0, ema=False, cached_teacher=None)
    dummy = replace(whole, step_rows=0, target_share=1, varied=False, prompts=0, wandb=False, verified=False)
    fitting = largest_that_fits(dummy, process, free, rows)
    peak = memory_plan(replace(dummy, rows=fitting, eval_rows=fitting), process).peak
    return fitting if peak <= free else 0


class DummyStep:
    """Student, optimizer and teacher with random weights on the device, and a micro-batch of random tokens."""

    def __init__(self, sizes: RunSizes, spec: RunSpec) -> None:
        self.device, precision = resolve_device(spec.machine.accelerator), sizes.precision
        self.autocast_dtype, dtype = named_dtype(precision.compute), named_dtype(precision.weights)
        self.uses_autocast = self.autocast_dtype != dtype
        self.student = Backbone(sizes.shape).to(self.device, dtype)
        if sizes.checkpointing:
            self.student.checkpoint_activations()
        self.optimizer = build_optimizer(self.student.named_parameters(), spec.config.optimizer, fused=True)
        self.teacher: Backbone | None = None
        if sizes.teacher:
            teacher = Backbone(sizes.teacher).to(self.device, named_dtype(precision.teacher))
            self.teacher = teacher.eval().requires_grad_(False)
        self.loss = spec.config.loss if self.teacher else None
        self.texts = max(sizes.prompts, 1)
        ids = torch.randint(sizes.shape.vocab_size, (sizes.rows, sizes.length + 1), device=self.device)
        self.inputs, self.labels = ids[:, :-1], ids[:, 1:].flatten()  # (B, T), (B·T,)

    def micro_batch(self) -> None:
        """Run forward and backward pass."""
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.uses_autocast):
            signal = self._teacher_signal()
            result = self.student(
                self.inputs,
                lambda hidden, weight: lm_head_loss(
                    hidden.flatten(0, 1), weight, self.labels, teacher=signal, loss=self.loss
                ),
            )
        (result.total / len(self.labels)).backward()

    @torch.no_grad()
    def _teacher_signal(self) -> DenseTeacher | None:
        if self.teacher is None:
            return None
        return self.teacher(self.inputs, lambda hidden, weight: DenseTeacher(hidden.flatten(0, 1), weight))

    @torch.no_grad()
    def decoding(self) -> None:
        """Run the forward pass of the first token of each text."""
        tokens = self.inputs[:1, :1].expand(self.texts, 1)  # (texts, 1)
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.uses_autocast):
            self.student(tokens, lambda hidden, weight: hidden @ weight.T.to(hidden.dtype))

    def measure(self) -> dict[str, float]:
        """Return median seconds of a micro-batch, an optimizer step and a decoded token, after a warm-up of each."""
        works: dict[str, Callable[[], Any]] = {
            "micro_batch": self.micro_batch,
            "optimizer": self.optimizer.step,
            "decoding": self.decoding,
        }
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(1 + STEPS):
            for name, work in works.items():
                start = time.perf_counter()
                work()
                synchronize(self.device)
                times[name].append(time.perf_counter() - start)
            self.optimizer.zero_grad()
        return {name: statistics.median(found[1:]) for name, found in times.items()}


def _measure(sizes: RunSizes, spec: RunSpec) -> dict[str, float]:
    plugins.load(spec.config.plugins, spec.config.plugins)  # which the parent process was permitted to import
    torch.set_num_threads(spec.machine.threads)
    keep_freed_memory()
    use_deterministic_algorithms(spec.config.trainer.get("deterministic"))
    return DummyStep(sizes, spec).measure()


if __name__ == "__main__":
    print(json.dumps(_measure(*pickle.load(sys.stdin.buffer))))
