"""fp8: the matrix products of the blocks in 8-bit floating point, by torchao; an experiment for Hopper GPUs.

Weights stay what they are. Before a product each side is scaled by its largest entry and rounded: inputs and weights to
e4m3, gradients to e5m2. The LM head, embeddings, norms, attention itself and the optimizer know nothing of it.
"""

import importlib.util
from collections.abc import Iterable

import torch
from torch import nn

from gpt2lab.errors import InputError

HOPPER = (9, 0)
INSTALL = 'pip install "torchao>=0.18"'


def check() -> None:
    """Whether the first GPU multiplies fp8 and torchao is there.

    Raises:
        InputError: one of them is not.
    """
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if capability is None or capability < HOPPER:
        there = "there is none here" if capability is None else f"here is one of capability {capability}"
        raise InputError(
            f"precision=fp8 needs an NVIDIA GPU of the Hopper generation or newer; {there}.\n"
            "Set precision=auto, or bf16."
        )
    if importlib.util.find_spec("torchao") is None:
        raise InputError(f"precision=fp8 needs the package torchao, which is not installed.\n{INSTALL}")


def to_fp8(blocks: Iterable[nn.Module], emulated: bool = False) -> None:
    """Let every nn.Linear of the blocks multiply in fp8; in place, with the same parameters under the same names.

    Args:
        emulated: round as fp8 does and multiply in fp32, on any device.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # A weight's gradient sums over positions, of which there need not be a multiple of 16
    config = Float8LinearConfig(emulate=emulated, pad_inner_dim=True)
    for block in blocks:
        convert_to_float8_training(block, config=config)
