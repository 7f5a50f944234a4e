"""Speed: tokens a second of a few real steps on random tokens, in a process of their own that ends with its memory.

python -m launch.memory.step_timing SIZES.json   prints the seconds of a micro-batch and of an optimizer step as JSON
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpt2lab.losses.dense_teacher import DenseTeacher
from gpt2lab.losses.lm_head_loss import lm_head_loss
from gpt2lab.model.backbone import Backbone
from gpt2lab.optim.optimizers import build_optimizer
from gpt2lab.settings import LossSettings, ModelShape, OptimizerSettings, PrecisionSettings
from gpt2lab.storage.model_folder import multiplied_parameters
from gpt2lab.system.device import flops_per_token, named_device, named_dtype, resident_memory_bytes, synchronize
from gpt2lab.system.malloc_tuning import keep_freed_memory
from launch.config.run_spec import RunSpec
from launch.distributed import child_processes
from launch.memory.memory_plan import largest_that_fits, memory_plan
from launch.memory.memory_terms import RunSizes

STEPS = 3
LONGEST = 60.0  # seconds that measuring may take
AFFORDABLE = {"cpu": 2e12}  # FLOP of measuring: seconds on a slow device; a smaller micro-batch is measured instead
ON_GPU = 2e15


@dataclass(frozen=True)
class Speed:
    """Of one device, or why it is unknown."""

    tokens_per_second: float | None
    says: str


def measured_speed(sizes: RunSizes, spec: RunSpec, free: int | None) -> Speed:
    """Time forward, backward and optimizer of a few micro-batches, with the teacher where each step runs it.

    Args:
        free: free bytes of the device; None: unknown.
    """
    machine = spec.machine
    rows = affordable_rows(sizes, AFFORDABLE.get(machine.accelerator, ON_GPU))
    if not rows:
        return Speed(None, "a few steps would take too long on this device")
    rows = fitting_rows(sizes, rows, free, resident_memory_bytes())
    if not rows:
        return Speed(None, "one device beside this plan has no room for the whole model in training")
    with tempfile.TemporaryDirectory(prefix="gpt2lab-plan-") as scratch:
        file = Path(scratch, "sizes.json")
        of_machine = {"threads": machine.threads, "accelerator": machine.accelerator}
        of_run = {"optimizer": asdict(spec.config.optimizer), "loss": asdict(spec.config.loss)}
        file.write_text(json.dumps({"sizes": asdict(replace(sizes, rows=rows)), **of_machine, **of_run}))
        command = [sys.executable, "-P", "-m", "launch.memory.step_timing", str(file)]
        try:
            ended = subprocess.run(
                command,
                env=child_processes.environment(),
                capture_output=True,
                text=True,
                timeout=LONGEST,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Speed(None, f"{STEPS} micro-batches take more than {LONGEST:.0f} seconds")
    if ended.returncode:
        return Speed(None, f"the steps failed: {(ended.stderr.strip() or 'no message').splitlines()[-1][:60]}")
    seconds = json.loads(ended.stdout.splitlines()[-1])
    parts = -(-sizes.step_rows // rows)
    of_a_step = parts * seconds["micro_batch"] + seconds["optimizer"]
    communication = ", communication left out" if sizes.ranks > 1 else ""
    whole = ", as if all weights were trained" if sizes.lora_rank or sizes.frozen_layers else ""
    says = f"measured: {STEPS} micro-batches of {rows} × {sizes.length} random tokens, eagerly{whole}{communication}"
    return Speed(parts * rows * sizes.length / of_a_step, says)


def affordable_rows(sizes: RunSizes, flop: float) -> int:
    """Sequences of the largest micro-batch whose measuring takes so much work at most; 0: not even one."""
    shape = sizes.shape
    of_a_token = flops_per_token(multiplied_parameters(vars(shape)), shape.n_layer, shape.n_embd, sizes.length)
    if sizes.teacher:
        of_a_token += 2 * multiplied_parameters(vars(sizes.teacher))
    return min(int(flop / (of_a_token * sizes.length * (1 + STEPS))), sizes.rows)


def fitting_rows(sizes: RunSizes, rows: int, free: int | None, process: int) -> int:
    """Sequences of the largest micro-batch, up to `rows`, whose rehearsal has room beside this process; 0: none.

    What is measured holds more than a rank of the run may: the model is not shared out, and all of it is trained.

    Args:
        free: bytes of the device; None: nobody knows.
        process: bytes that a process holds before there is a model.
    """
    if free is None:
        return rows
    whole = replace(sizes, sharded=False, ranks=1, lora_rank=0, frozen_layers=0)
    alone = replace(whole, step_rows=0, ema=False, reading_teacher=None)
    fitting = largest_that_fits(alone, process, free, rows)
    peak = memory_plan(replace(alone, rows=fitting, eval_rows=fitting), process).peak
    return fitting if peak <= free else 0


class Rehearsal:
    """Student, optimizer and teacher of random weights on the device, and one micro-batch of random tokens.

    Args:
        spec: what `measured_speed` wrote.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        sizes, self.device = spec["sizes"], named_device(spec["accelerator"])
        precision = PrecisionSettings(**sizes["precision"])
        self.low, weights = named_dtype(precision.compute), named_dtype(precision.weights)
        self.casts = self.low != weights
        self.student = Backbone(ModelShape(**sizes["shape"])).to(self.device, weights)
        if sizes["checkpointing"]:
            self.student.checkpoint_activations()
        settings = OptimizerSettings(**spec["optimizer"])
        self.optimizer = build_optimizer(self.student.named_parameters(), settings, fused=True)
        self.teacher: Backbone | None = None
        if sizes["teacher"]:
            teacher = Backbone(ModelShape(**sizes["teacher"])).to(self.device, named_dtype(precision.teacher))
            self.teacher = teacher.eval().requires_grad_(False)
        self.loss = LossSettings(**spec["loss"]) if self.teacher else None
        ids = torch.randint(sizes["shape"]["vocab_size"], (sizes["rows"], sizes["length"] + 1), device=self.device)
        self.inputs, self.labels = ids[:, :-1], ids[:, 1:].flatten()  # (B, T), (B·T,)

    def micro_batch(self) -> None:
        """Forward and backward."""
        with torch.autocast(self.device.type, dtype=self.low, enabled=self.casts):
            signal = self._said()
            result = self.student(
                self.inputs,
                lambda hidden, weight: lm_head_loss(
                    hidden.flatten(0, 1), weight, self.labels, teacher=signal, loss=self.loss
                ),
            )
        (result.total / len(self.labels)).backward()

    @torch.no_grad()
    def _said(self) -> DenseTeacher | None:
        if self.teacher is None:
            return None
        return self.teacher(self.inputs, lambda hidden, weight: DenseTeacher(hidden.flatten(0, 1), weight))

    def seconds(self) -> dict[str, float]:
        """Medians of a micro-batch and of the optimizer's step, after a first of each."""
        times: dict[str, list[float]] = {"micro_batch": [], "optimizer": []}
        for _ in range(1 + STEPS):
            for name, work in (("micro_batch", self.micro_batch), ("optimizer", self.optimizer.step)):
                start = time.perf_counter()
                work()
                synchronize(self.device)
                times[name].append(time.perf_counter() - start)
            self.optimizer.zero_grad()
        return {name: statistics.median(found[1:]) for name, found in times.items()}


def _measure(spec: dict[str, Any]) -> dict[str, float]:
    torch.set_num_threads(spec["threads"])
    keep_freed_memory()
    return Rehearsal(spec).seconds()


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(Path(sys.argv[1]).read_text()))))
