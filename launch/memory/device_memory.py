"""Device memory: whether a model, what trains it and its teacher fit on one device, by parameters times bytes."""

import os

import torch

from gpt2lab.storage.model_folder import folder_of, parameters_of, read_shape
from launch.config.schema import Config

USABLE = 0.75  # of a device's memory; activations, chunks of logits and the allocator need the rest
VOCABULARY = 50_257  # while the tokenizer is not yet known
LARGE_CHECKPOINT = 8e9  # bytes above which ranks write their own parts instead of one file


def fits(config: Config, devices: int, teacher_parts: int) -> bool:
    """Whether one device has room for its part of what is kept from step to step.

    Args:
        devices: over which the model and its optimizer are split; 1: not at all.
        teacher_parts: the same for the teacher.
    """
    needed = state_bytes(config) / devices + teacher_bytes(config) / teacher_parts
    return needed <= USABLE * device_bytes(config)


def state_bytes(config: Config) -> int:
    """Weights, gradients and two optimizer moments of the model, and its weight average, which is fp32 always."""
    size = _bytes_of_a_weight(config)
    return _parameters(config) * (size + (0 if config.lora_rank else 3 * size) + (4 if config.ema else 0))


def checkpoint_bytes(config: Config) -> int:
    """Weights and two optimizer moments."""
    return 3 * _bytes_of_a_weight(config) * _parameters(config)


def teacher_bytes(config: Config) -> int:
    """The teacher's weights; 0 where none is asked while the student trains."""
    if config.task_name != "distill" or config.teacher_cache.name != "none":
        return 0
    size = 4 if config.precision == "fp32" else 2
    return size * parameters_of(read_shape(folder_of(config.teacher, "teacher")))


def device_bytes(config: Config) -> int:
    """Of the smallest device, or of one that is planned for; of CPU processes an equal share of the machine's."""
    if config.planned_device_bytes is not None:
        return config.planned_device_bytes
    if config.accelerator == "gpu":
        return min(torch.cuda.get_device_properties(number).total_memory for number in range(int(config.devices)))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // int(config.devices)


def _bytes_of_a_weight(config: Config) -> int:
    return 2 if config.precision == "bf16_true" else 4


def _parameters(config: Config) -> int:
    return parameters_of({**vars(config.model), "vocab_size": max(VOCABULARY, config.vocab_size)})
