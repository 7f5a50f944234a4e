"""Automatic choices: precision, strategy, devices, threads, micro-batch and compile, where they are `auto`.

They are made once and written into the run's config.yaml, so a resumed run computes what the first one did.
"""

import logging
import math
import os
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path

import torch

from gpt2lab.errors import InputError
from gpt2lab.settings import PrecisionSettings
from gpt2lab.storage.damaged_files import warn_once
from gpt2lab.storage.model_folder import matmul_parameter_count
from gpt2lab.system.device import multiplies_bf16, resident_memory_bytes
from gpt2lab.system.free_memory import free_bytes
from launch.checks import checks, sharding
from launch.config.groups import precision_named
from launch.config.machine import usable_cores
from launch.config.run_spec import Inputs, Machine, RunSpec
from launch.config.schema import RunConfig
from launch.memory import device_memory
from launch.memory.memory_plan import largest_that_fits
from launch.memory.run_sizes import expected_vocabulary, fastest_micro_batch, rank_memory_limit, run_sizes

log = logging.getLogger(__name__)

# Of model small on an H200 (benchmarks/RESULTS.md): FLOP/s of eager training, and the share of its time that compiled
# blocks save. The cost of compiling is an estimate
GPU_FLOPS, COMPILE_GAIN, COMPILE_SECONDS = 180e12, 0.35, 60.0
USED = 0.9  # share of the free memory that a micro-batch may fill: other programs grow too, and a plan is not exact
HEAD_COMPILE_STEPS = 50  # compiling the work on the LM head's logits takes seconds and then halves its time


def choose_machine(config: RunConfig, inputs: Inputs, free: int | None = None) -> Machine:
    """Choose everything that `auto` leaves to this machine and this run.

    Args:
        free: free bytes of memory, see `free_memory`, which the micro-batch then fits into; None: unknown.

    Raises:
        InputError: a GPU is given where there is none, more devices than there are, or fp16 on a CPU.
    """
    accelerator = chosen_accelerator(config)
    devices = _devices(config, accelerator)
    precision = _precision(config, accelerator)
    machine = Machine(
        accelerator=accelerator,
        devices=devices,
        num_nodes=config.num_nodes,
        precision=precision,
        strategy="auto",
        checkpoint_format="single",
        shard_teacher=False,
        threads=max(1, cpu_cores() // devices) if config.threads == "auto" else int(config.threads),
    )
    machine = replace(machine, strategy=_strategy(config, inputs, machine))
    sharding.check(config, accelerator, precision, machine.strategy)
    machine = replace(
        machine,
        checkpoint_format=_checkpoint_format(config, inputs, machine),
        shard_teacher=_shard_teacher(config, inputs, machine),
    )
    checks.check_batch(config, devices)
    machine = replace(machine, largest_micro_batch=_largest_that_fits(config, inputs, machine, free))
    micro_batch, accumulate = split_batch(config, machine)
    return replace(machine, micro_batch=micro_batch, accumulate=accumulate)


def free_memory(config: RunConfig) -> int | None:
    """Return the free bytes of a device of the run's kind, or of the host's memory where that is a CPU."""
    planned = config.planned_device_bytes
    return free_bytes(chosen_accelerator(config)) if planned is None else planned


def _largest_that_fits(config: RunConfig, inputs: Inputs, machine: Machine, free: int | None) -> int:
    """Return the sequences of the largest micro-batch that fits into the free memory, up to the fastest size."""
    fastest, process = fastest_micro_batch(config, machine), resident_memory_bytes()
    room = rank_memory_limit(machine, free, process)
    if room is None:
        return fastest
    sizes = run_sizes(config, inputs, machine, expected_vocabulary(config, inputs))
    return largest_that_fits(sizes, process, int(USED * room), fastest)


def suggested_micro_batch(spec: RunSpec) -> int:
    """Return what micro_batch=auto takes of a resolved run's batch."""
    machine = spec.machine
    return min(machine.largest_micro_batch, math.ceil(spec.config.global_batch_rows / machine.world_size))


def split_batch(config: RunConfig, machine: Machine) -> tuple[int, int]:
    """Return (largest micro-batch, micro-batches on each rank): every one of them gets at least one sequence."""
    rows, ranks = config.global_batch_rows, machine.world_size
    size = machine.largest_micro_batch if config.micro_batch == "auto" else int(config.micro_batch)
    accumulate = min(math.ceil(rows / (ranks * size)), rows // ranks)
    return math.ceil(rows / (ranks * accumulate)), accumulate


def compile_pays(spec: RunSpec, vocab_size: int) -> bool:
    """Return whether compiling the blocks saves more within this run than it costs, and works here at all.

    On a CPU it gains a twentieth at most: docs/measurements/performance.md has the figures.
    """
    given = str(spec.config.compile).lower()
    fixed = not spec.config.sequences.on_policy  # text of the student has another length at every step
    pays = fixed and spec.machine.accelerator == "gpu" and _saves_time(spec, vocab_size)
    return compiles(given == "true" or (given == "auto" and pays))


def compiles(requested: bool) -> bool:
    """Return whether to compile what is requested; a machine that cannot is reported."""
    if requested and not has_compiler():
        warn_once("No C++ compiler or no Python.h here, so nothing is compiled: training runs eagerly.")
    return requested and has_compiler()


def _saves_time(spec: RunSpec, vocab_size: int) -> bool:
    config = spec.config
    tokens = config.steps * config.global_batch_rows * config.context
    work = 6 * matmul_parameter_count({**vars(spec.resolved.model), "vocab_size": vocab_size}) * tokens
    return work / (GPU_FLOPS * spec.machine.world_size) * COMPILE_GAIN > COMPILE_SECONDS


def compiling_the_head_pays(spec: RunSpec) -> bool:
    """Return whether to compile the work on the LM head's logits, on any device."""
    given, enough = str(spec.config.compile).lower(), spec.config.steps >= HEAD_COMPILE_STEPS
    return compiles(given == "true" or (given == "auto" and spec.machine.accelerator != "mps" and enough))


def has_compiler() -> bool:
    """Inductor needs a C++ compiler and Python's headers."""
    compiler = os.environ.get("CXX") or "g++"
    return shutil.which(compiler) is not None and Path(sysconfig.get_paths()["include"], "Python.h").is_file()


def chosen_accelerator(config: RunConfig) -> str:
    """Return cpu, gpu or mps.

    Raises:
        InputError: the given one is not there.
    """
    available = {"cpu": True, "gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if config.accelerator == "auto":
        return "gpu" if available["gpu"] else "mps" if available["mps"] else "cpu"
    if not available[config.accelerator] and config.plan_memory is None:
        have = ", ".join(name for name, there in available.items() if there)
        raise InputError(
            f"accelerator={config.accelerator}: PyTorch {torch.__version__} finds no such device here.\n"
            f"There is: {have}. Check the driver and that PyTorch was installed for it, or set accelerator=auto.\n"
            "To plan a run of another machine: plan=true plan_memory=GB_OF_EACH_GPU"
        )
    return config.accelerator


def _devices(config: RunConfig, accelerator: str) -> int:
    there = max(torch.cuda.device_count(), 1) if accelerator == "gpu" else 1
    if config.devices == "auto":
        return there
    requested = int(config.devices)
    if config.plan_memory is not None:
        return requested
    most = cpu_cores() if accelerator == "cpu" else there
    if requested > most:
        what = "cores to run a process on each" if accelerator == "cpu" else "devices"
        fix = ", or n_jobs: jobs that run at once share them out" if config.n_jobs > 1 else ""
        raise InputError(
            f"devices={requested}: there are {most} {what} (accelerator={accelerator}).\nLower devices{fix}."
        )
    return requested


def _strategy(config: RunConfig, inputs: Inputs, machine: Machine) -> str:
    if config.strategy.name == "auto" and machine.world_size == 1:
        return "auto"
    if config.strategy.name == "auto":
        if device_memory.fits(config, inputs, machine, devices=1, teacher_parts=1):
            return "ddp"
        needed = device_memory.state_bytes(config, inputs, machine)
        needed += device_memory.teacher_bytes(config, inputs, machine)
        log.info(
            "strategy=fsdp: model, optimizer and teacher take %.1f GB, too much for one device's %.1f GB",
            needed / 1e9,
            device_memory.device_bytes(config, machine) / 1e9,
        )
        return "fsdp"
    if machine.accelerator == "mps":
        raise InputError(
            f"strategy={config.strategy.name} does not work on mps, which is one device; set strategy=auto."
        )
    return config.strategy.name


def _checkpoint_format(config: RunConfig, inputs: Inputs, machine: Machine) -> str:
    if config.checkpoint_format != "auto":
        return config.checkpoint_format
    if machine.strategy != "fsdp":
        return "single"
    is_large = device_memory.checkpoint_bytes(config, inputs, machine) >= device_memory.LARGE_CHECKPOINT
    return "sharded" if is_large else "single"


def _shard_teacher(config: RunConfig, inputs: Inputs, machine: Machine) -> bool:
    requested = str(config.strategy.shard_teacher).lower()
    if requested != "auto":
        return requested == "true"
    ranks = machine.world_size
    return machine.strategy == "fsdp" and not device_memory.fits(config, inputs, machine, ranks, teacher_parts=1)


def _precision(config: RunConfig, accelerator: str) -> PrecisionSettings:
    checks.check_precision(config, accelerator)
    if config.precision.name != "auto":
        if config.precision.compute == "bfloat16" and accelerator == "cpu" and not multiplies_bf16("cpu"):
            slow = "this CPU does not multiply bf16 in hardware; precision=fp32 is many times faster"
            log.warning("precision=%s: %s", config.precision.name, slow)
        return config.precision
    if config.plan_memory is not None:
        return precision_named("bf16")  # as GPUs have it since 2020
    has_bf16 = accelerator != "mps" and multiplies_bf16("cuda" if accelerator == "gpu" else "cpu")
    chosen = "bf16" if has_bf16 else "fp16" if accelerator == "gpu" else "fp32"
    return precision_named(chosen)


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(usable_cores())
