"""Determinism: bitwise repeatable training on a GPU (`trainer.deterministic`).

PyTorch replaces its nondeterministic kernels, such as scatter-add with atomics and the backward pass of attention, or
raises an error where there is no other. cuBLAS needs a fixed workspace, which it reads from the environment when CUDA
starts.

Source: https://docs.pytorch.org/docs/stable/notes/randomness.html.
"""

import os
from typing import TYPE_CHECKING

from gpt2lab.errors import InputError

if TYPE_CHECKING:
    import torch

CUBLAS_VARIABLE, CUBLAS_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
WARN = "warn"


def fix_cublas_workspace(deterministic: bool | str | None) -> None:
    """Set cuBLAS's workspace in the environment, which child processes inherit; call it before CUDA starts.

    Raises:
        InputError: the environment has another value, with which cuBLAS is not deterministic.
    """
    if not deterministic:
        return
    given = os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACES[0])
    if given not in CUBLAS_WORKSPACES:
        raise InputError(
            f"trainer.deterministic={str(deterministic).lower()} with {CUBLAS_VARIABLE}={given} in the environment: "
            f"cuBLAS is deterministic with {' or '.join(CUBLAS_WORKSPACES)} only.\n"
            f"Unset the variable, or set one of these."
        )


def use_deterministic_algorithms(deterministic: bool | str | None) -> None:
    """Let this process use deterministic kernels only; `warn`: others with a warning where there is none."""
    import torch

    fix_cublas_workspace(deterministic)
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=deterministic == WARN)


def has_deterministic_cumsum(device: "torch.device") -> bool:
    """Return whether floats can be summed cumulatively; on a GPU PyTorch has no deterministic algorithm for it."""
    import torch

    return device.type != "cuda" or not torch.are_deterministic_algorithms_enabled()
