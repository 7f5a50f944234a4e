"""Device memory: quick estimate whether model, optimizer state and teacher fit on one device (parameters × bytes)."""

import os

import torch

from gpt2lab.storage.model_folder import parameter_count, read_shape, resolve_model_folder
from launch.config.run_spec import Inputs, Machine
from launch.config.schema import RunConfig

USABLE_SHARE = 0.75  # of the device memory; activations, chunks of logits and the allocator need the rest
DEFAULT_VOCAB_SIZE = 50_257  # assumed before the tokenizer is known
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
    size = machine.precision.weight_bytes
    return _parameters(config, inputs) * (size + (0 if config.lora_rank else 3 * size) + (4 if config.ema else 0))


def checkpoint_bytes(config: RunConfig, inputs: Inputs, machine: Machine) -> int:
    """Return bytes of the weights and two optimizer moments."""
    return 3 * machine.precision.weight_bytes * _parameters(config, inputs)


def teacher_bytes(config: RunConfig, inputs: Inputs, machine: Machine) -> int:
    """Return bytes of the teacher's weights; 0 if no teacher is loaded in training."""
    if config.task_name != "distill" or config.teacher_cache.name != "none":
        return 0
    shape = read_shape(resolve_model_folder(inputs.teacher, "teacher"))
    return machine.precision.teacher_bytes * parameter_count(shape)


def device_bytes(config: RunConfig, machine: Machine) -> int:
    """Return the memory of the smallest GPU, or of a planned one; on a CPU an equal share of host memory per rank."""
    if config.planned_device_bytes is not None:
        return config.planned_device_bytes
    if machine.accelerator == "gpu":
        return min(torch.cuda.get_device_properties(number).total_memory for number in range(machine.devices))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // machine.devices


def _parameters(config: RunConfig, inputs: Inputs) -> int:
    return parameter_count({**vars(inputs.model), "vocab_size": max(DEFAULT_VOCAB_SIZE, config.vocab_size)})
