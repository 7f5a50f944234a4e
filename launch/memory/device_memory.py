"""Device memory: whether model, optimizer state and teacher fit on one device, before the batch is split.

Uses the terms of memory_terms.py. Every optimizer counts as AdamW, with two moments of each parameter.
"""

import os
from dataclasses import replace

import torch

from launch.config.run_spec import Inputs, Machine
from launch.config.schema import RunConfig
from launch.memory.memory_plan import memory_plan
from launch.memory.run_sizes import GPT2_VOCAB_SIZE, run_sizes

USABLE_SHARE = 0.75  # of the device memory; activations, chunks of logits and the allocator need the rest
STATE = ("weights", "gradients", "optimizer state", "averaged weights")
LARGE_CHECKPOINT = 8e9  # bytes; larger checkpoints are sharded, with one file per rank


def fits(config: RunConfig, inputs: Inputs, machine: Machine, devices: int, teacher_parts: int) -> bool:
    """Return whether one device has memory for its shard of weights, gradients, optimizer state and teacher.

    Args:
        devices: devices that shard the model and its optimizer; 1: no sharding.
        teacher_parts: devices that shard the teacher.
    """
    needed = state_bytes(config, inputs, machine) / devices + teacher_bytes(config, inputs, machine) / teacher_parts
    return needed <= USABLE_SHARE * device_bytes(config, machine)


def state_bytes(config: RunConfig, inputs: Inputs, machine: Machine) -> int:
    """Return bytes of weights, gradients, two optimizer moments, and the averaged weights, which are always fp32."""
    return _bytes(config, replace(inputs, teacher=""), machine, STATE)


def checkpoint_bytes(config: RunConfig, inputs: Inputs, machine: Machine) -> int:
    """Return bytes of the weights and two optimizer moments."""
    return _bytes(config, replace(inputs, teacher=""), machine, ("weights", "optimizer state"))


def teacher_bytes(config: RunConfig, inputs: Inputs, machine: Machine) -> int:
    """Return bytes of the teacher's weights; 0 if no teacher is loaded in training."""
    return _bytes(config, inputs, machine, ("teacher weights",))


def device_bytes(config: RunConfig, machine: Machine) -> int:
    """Return the memory of the smallest GPU, or of a planned one; on a CPU an equal share of host memory per rank."""
    if config.planned_device_bytes is not None:
        return config.planned_device_bytes
    if machine.accelerator == "gpu":
        return min(torch.cuda.get_device_properties(number).total_memory for number in range(machine.devices))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // machine.devices


def _bytes(config: RunConfig, inputs: Inputs, machine: Machine, names: tuple[str, ...]) -> int:
    sizes = run_sizes(config, inputs, machine, max(GPT2_VOCAB_SIZE, config.vocab_size))  # the tokenizer is unknown yet
    parts = memory_plan(replace(sizes, optimizer="adamw", sharded=False, sharded_teacher=False)).parts
    return sum(parts[name] for name in names)
