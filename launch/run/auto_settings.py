"""Automatic: the choices left to the machine — precision, strategy, devices, threads, micro-batch, compile.

They are made once and written into the run's config.yaml, so a resumed run computes what the first one did.
"""

import logging
import math
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from gpt2lab.errors import InputError
from gpt2lab.model import fp8
from gpt2lab.storage.model_folder import multiplied_parameters
from gpt2lab.system.device import resident_memory_bytes
from launch.checks import checks, sharding
from launch.config.machine import usable_cores
from launch.config.schema import Config
from launch.memory import device_memory
from launch.memory.free_memory import free_bytes
from launch.memory.memory_plan import largest_that_fits
from launch.memory.run_sizes import expected_vocabulary, fastest_micro_batch, room_of_a_device, run_sizes

log = logging.getLogger(__name__)

# GPU: 6 · parameters · tokens per second of eager training, and the share of its time that compiled blocks save: small
# on an H200 (benchmarks/RESULTS.md). What compiling costs is an estimate
GPU_FLOPS, COMPILE_GAIN, COMPILE_SECONDS = 180e12, 0.35, 60.0
USED = 0.9  # share of the free memory that a micro-batch may fill: other programs grow too, and a plan is not exact
HEAD_COMPILE_STEPS = 50  # compiling the work on the LM head's logits takes seconds and then halves its time


def settle(config: Config, free: int | None = None) -> None:
    """Replace every `auto` by what this machine and this run call for.

    Args:
        free: bytes of memory that are free, see `free_memory`; micro-batches then fit into them, which takes a resolved
            configuration. None: nobody knows.

    Raises:
        InputError: a GPU is asked for where there is none, more devices than there are, fp16 on a CPU, or fp8 on what
            does not multiply it.
    """
    config.accelerator = _accelerator(config)
    config.devices = _devices(config)
    config.precision = _precision(config)
    config.strategy = _strategy(config)
    sharding.check(config)
    config.checkpoint_format = _checkpoint_format(config)
    config.shard_teacher = _shard_teacher(config)
    config.record.world_size = config.devices * config.num_nodes
    checks.check_batch(config)
    config.threads = config.threads if config.threads != "auto" else max(1, cpu_cores() // config.devices)
    config.record.largest_micro_batch = 0  # that of another machine
    config.record.largest_micro_batch = _largest_that_fits(config, free)
    config.micro_batch, config.record.accumulate = split_batch(config)


def free_memory(config: Config) -> int | None:
    """Bytes that are free on a device of the kind that the run takes, or in the host's memory where that is a CPU."""
    planned = config.planned_device_bytes
    return free_bytes(_accelerator(config)) if planned is None else planned


def largest_micro_batch(config: Config) -> int:
    """Sequences that one device works on at a time when nothing else is said."""
    return config.record.largest_micro_batch or fastest_micro_batch(config)


def _largest_that_fits(config: Config, free: int | None) -> int:
    """Sequences of the largest micro-batch that gets faster by its size and fits into the memory that is free."""
    fastest, process = fastest_micro_batch(config), resident_memory_bytes()
    room = room_of_a_device(config, free, process)
    if room is None:
        return fastest
    return largest_that_fits(run_sizes(config, expected_vocabulary(config)), process, int(USED * room), fastest)


def suggested_micro_batch(config: Config) -> int:
    """What micro_batch=auto takes of a settled configuration's batch."""
    return min(largest_micro_batch(config), math.ceil(config.rows_of_a_step / max(config.record.world_size, 1)))


def split_batch(config: Config) -> tuple[int, int]:
    """(largest micro-batch, number of micro-batches on each rank): every one of them gets at least one sequence."""
    rows, ranks = config.rows_of_a_step, config.record.world_size
    wanted = largest_micro_batch(config) if config.micro_batch == "auto" else int(config.micro_batch)
    accumulate = min(math.ceil(rows / (ranks * wanted)), rows // ranks)
    return math.ceil(rows / (ranks * accumulate)), accumulate


def compile_pays(config: Config, vocab_size: int) -> bool:
    """Whether compiling the blocks saves more within this run than it costs, and can work here at all.

    On a CPU it gains nothing: docs/performance.md has the figures.
    """
    given = str(config.compile).lower()
    fixed = not config.sequences.by_student  # what the student writes has another length at every step
    pays = fixed and config.accelerator == "gpu" and _saves_time(config, vocab_size)
    wanted = given == "true" or (given == "auto" and pays)
    if wanted and not has_compiler():
        log.warning("No C++ compiler or no Python.h here, so nothing is compiled: training runs eagerly.")
    return wanted and has_compiler()


def _saves_time(config: Config, vocab_size: int) -> bool:
    tokens = config.steps * config.rows_of_a_step * config.context
    work = 6 * multiplied_parameters({**vars(config.model), "vocab_size": vocab_size}) * tokens
    return work / (GPU_FLOPS * int(config.devices)) * COMPILE_GAIN > COMPILE_SECONDS


def compiling_the_head_pays(config: Config) -> bool:
    """Whether to compile the work on the LM head's logits, on any device.

    Must be asked before `compile_pays` settles `compile`, because it follows what was said by hand.
    """
    given = str(config.compile).lower()
    wanted = given == "true" or (given == "auto" and config.accelerator != "mps" and config.steps >= HEAD_COMPILE_STEPS)
    return wanted and has_compiler()


def has_compiler() -> bool:
    """Inductor needs a C++ compiler and Python's headers."""
    compiler = os.environ.get("CXX") or "g++"
    return shutil.which(compiler) is not None and Path(sysconfig.get_paths()["include"], "Python.h").is_file()


def _accelerator(config: Config) -> str:
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


def _devices(config: Config) -> int:
    there = max(torch.cuda.device_count(), 1) if config.accelerator == "gpu" else 1
    if config.devices == "auto":
        return there
    wanted = int(config.devices)
    if config.plan_memory is not None:
        return wanted
    most = cpu_cores() if config.accelerator == "cpu" else there
    if wanted > most:
        what = "cores to run a process on each" if config.accelerator == "cpu" else "devices"
        cure = ", or n_jobs: jobs that run at once share them out" if config.n_jobs > 1 else ""
        raise InputError(
            f"devices={wanted}: there are {most} {what} (accelerator={config.accelerator}).\nLower devices{cure}."
        )
    return wanted


def _strategy(config: Config) -> str:
    if config.strategy == "auto" and config.devices * config.num_nodes == 1:
        return "auto"
    if config.strategy == "auto":
        if device_memory.fits(config, devices=1, teacher_parts=1):
            return "ddp"
        needed = device_memory.state_bytes(config) + device_memory.teacher_bytes(config)
        log.info(
            "strategy=fsdp: model, optimizer and teacher take %.1f GB, too much for one device's %.1f GB",
            needed / 1e9,
            device_memory.device_bytes(config) / 1e9,
        )
        return "fsdp"
    if config.accelerator == "mps":
        raise InputError(f"strategy={config.strategy} does not work on mps, which is one device; set strategy=auto.")
    return config.strategy


def _checkpoint_format(config: Config) -> str:
    if config.checkpoint_format != "auto":
        return config.checkpoint_format
    if config.strategy != "fsdp":
        return "single"
    is_large = device_memory.checkpoint_bytes(config) >= device_memory.LARGE_CHECKPOINT
    return "sharded" if is_large else "single"


def _shard_teacher(config: Config) -> bool:
    if str(config.shard_teacher).lower() != "auto":
        return str(config.shard_teacher).lower() == "true"
    ranks = int(config.devices) * config.num_nodes
    return config.strategy == "fsdp" and not device_memory.fits(config, ranks, teacher_parts=1)


def _precision(config: Config) -> str:
    if config.precision == "fp16" and config.accelerator == "cpu":
        checks.refuse_fp16_on_cpu()
    if config.precision == "fp8" and config.plan_memory is None:
        fp8.check()
    if config.precision != "auto":
        return config.precision
    if config.plan_memory is not None:
        return "bf16"  # as GPUs have it since 2020
    has_bf16 = config.accelerator == "cpu" and cpu_has_bf16()
    if config.accelerator == "gpu":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    chosen = "bf16" if has_bf16 else "fp16" if config.accelerator == "gpu" else "fp32"
    has = "multiplies bf16 in hardware" if has_bf16 else "does not multiply bf16 in hardware"
    log.info("precision=%s: this %s %s", chosen, config.accelerator.upper(), has)
    return chosen


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(usable_cores())


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX)."""
    flags = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags
