"""Tensor file: reads tensors and plain values that torch.save wrote, and never runs code that a file may hold.

torch.load and pickle build any object that a file names. Here only PyTorch's own list of harmless types is built
(`weights_only=True`); a file with anything else, or a damaged one, is an InputError.
"""

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gpt2lab.errors import InputError

UNREADABLE: tuple[type[Exception], ...] = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError),
    *(TypeError, AttributeError, ImportError, OverflowError, RecursionError),
)
NEEDED = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step")  # of a training's checkpoint


def read_tensor_file(path: Path, mmap: bool = False) -> Any:
    """Read a file of torch.save onto the CPU.

    Raises:
        InputError: it is damaged, or holds other objects than tensors and plain values.
    """
    with unreadable_is_refused(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def read_checkpoint_file(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Read a training's checkpoint onto the CPU.

    Raises:
        InputError: as of `read_tensor_file`, or it is no checkpoint of a training.
    """
    checkpoint = read_tensor_file(path, mmap)
    missing = [key for key in NEEDED if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise InputError(f"{path} is no checkpoint of a training: it has no {', '.join(missing)}.\nGive another run.")
    return checkpoint


@contextmanager
def unreadable_is_refused(path: Path) -> Iterator[None]:
    """Turn what PyTorch raises for a file that is damaged or that holds other objects into an InputError.

    PyTorch's own message recommends to read the file without this protection.

    Raises:
        InputError
    """
    try:
        yield
    except InputError:
        raise
    except UNREADABLE as error:
        if "allocate memory" in str(error):
            raise
        raise InputError(refusal(str(path), error)) from error


def refusal(file: str, error: BaseException) -> str:
    """Why a file is not read, in two lines."""
    text = str(error)
    named = re.search(r"\bGLOBAL ([\w.]+)|: ([\w.]+) is not permitted", text)
    if named or (isinstance(error, pickle.UnpicklingError) and "Unsupported" in text):
        what = f" ({named[1] or named[2]})" if named else ""
        return (
            f"{file} holds other objects than tensors and plain values{what}, which could run code; it was not read.\n"
            "Give a file from a source that you trust to hold weights alone, best as .safetensors."
        )
    return f"{file} is damaged or no file of PyTorch; it was not read.\nCopy it again, or give another."
