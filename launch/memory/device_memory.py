"""Device memory: whether a model, what trains it and its teacher fit on one device, by parameters times bytes."""

import os

import torch

from gpt2lab.storage.model_folder import folder_of, parameters_of, read_shape
from launch.config.run_spec import Inputs, Machine
from launch.config.schema import RunConfig

USABLE = 0.75  # of a device's memory; activations, chunks of logits and the allocator need the rest
VOCABULARY = 50_257  # while the tokenizer is not yet known
LARGE_CHECKPOINT = 8e9  # bytes above which ranks write their own parts instead of one file


def fits(config: RunConfig, inputs: Inputs, machine: Machine, devices: int, teacher_parts: int) -> bool:
    """Return whether one device has memory for its part of what is kept from step to step.

    Args:
        devices: number that the model and its optimizer are sharded over; 1: not at all.
        teacher_parts: the same for the teacher.
    """
    needed = state_bytes(config, inputs, machine) / devices + teacher_bytes(config, inputs, machine) / teacher_parts
    return needed <= USABLE * device_bytes(config, machine)


def state_bytes(config: RunConfig, inputs: Inputs, machine: Machine) -> int:
    """Return bytes of weights, gradients, two optimizer moments, and the weight average, which is always fp32."""
    size = machine.precision.weight_bytes
    return _parameters(config, inputs) * (size + (0 if config.lora_rank else 3 * size) + (4 if config.ema else 0))


def checkpoint_bytes(config: RunConfig, inputs: Inputs, machine: Machine) -> int:
    """Return bytes of the weights and two optimizer moments."""
    return 3 * machine.precision.weight_bytes * _parameters(config, inputs)


def teacher_bytes(config: RunConfig, inputs: Inputs, machine: Machine) -> int:
    """Return bytes of the teacher's weights; 0 where the student trains without a loaded one."""
    if config.task_name != "distill" or config.teacher_cache.name != "none":
        return 0
    return machine.precision.teacher_bytes * parameters_of(read_shape(folder_of(inputs.teacher, "teacher")))


def device_bytes(config: RunConfig, machine: Machine) -> int:
    """Return the memory of the smallest device, or of a planned one; of CPU processes an equal share of the host's."""
    if config.planned_device_bytes is not None:
        return config.planned_device_bytes
    if machine.accelerator == "gpu":
        return min(torch.cuda.get_device_properties(number).total_memory for number in range(machine.devices))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // machine.devices


def _parameters(config: RunConfig, inputs: Inputs) -> int:
    return parameters_of({**vars(inputs.model), "vocab_size": max(VOCABULARY, config.vocab_size)})
