"""Tensor file: tensors and plain values written by torch.save, read without running code from the file.

Files are loaded with `weights_only=True`. A damaged file, or one with other objects, raises an InputError; a checkpoint
is written without such objects.
"""

import copy
import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gpt2lab.errors import InputError
from gpt2lab.storage.damaged_files import warn_once

UNREADABLE: tuple[type[Exception], ...] = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError),
    *(TypeError, AttributeError, ImportError, OverflowError, RecursionError),
)
CHECKPOINT_KEYS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step")  # Lightning's
CALLBACKS = "callbacks"  # Lightning's: callback → state


def read_tensor_file(path: Path, mmap: bool = False) -> Any:
    """Load a file written by torch.save onto the CPU.

    Raises:
        InputError: the file is damaged or contains other objects than tensors and plain values.
    """
    with input_error_when_unreadable(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def read_checkpoint_file(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Load a training checkpoint onto the CPU.

    Raises:
        InputError: see `read_tensor_file`; also if the file is not a training checkpoint.
    """
    checkpoint = read_tensor_file(path, mmap)
    missing = [key for key in CHECKPOINT_KEYS if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise InputError(f"{path} is not a training checkpoint: it has no {', '.join(missing)}.\nGive another run.")
    return checkpoint


def write_tensor_file(content: Any, path: Path) -> None:
    """Write a file that `read_tensor_file` reads, without a copy in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        torch.save(content, file)


def copy_to_cpu(content: Any) -> Any:
    """Return a copy of nested containers with their tensors on the CPU; tensors share memory as they did before."""
    copied = _copy_to_cpu(content, {})
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copied


def _copy_to_cpu(value: Any, storages: dict[tuple[torch.device, int, int], torch.Tensor]) -> Any:
    """Copy a value; `storages` are the bytes that are copied already, by device, address and size."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        copied = kind((key, _copy_to_cpu(one, storages)) for key, one in value.items())
        if kind is OrderedDict:
            vars(copied).update(vars(value))  # versions of the modules of a state dict
        return copied
    if kind in (list, tuple):
        return kind(_copy_to_cpu(one, storages) for one in value)
    if kind is not torch.Tensor or value.layout != torch.strided or _is_more_than_bytes(value):
        return copy.deepcopy(value)
    storage = value.untyped_storage()
    where = (value.device, storage.data_ptr(), storage.nbytes())  # tensors over parts of one NumPy array differ in size
    if where not in storages:
        given = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
        bytes_on_cpu = torch.empty(given.shape, dtype=torch.uint8, pin_memory=value.is_cuda)
        storages[where] = bytes_on_cpu.copy_(given, non_blocking=True)
    shared = storages[where].untyped_storage()
    return torch.empty(0, dtype=value.dtype).set_(shared, value.storage_offset(), value.size(), value.stride())


def _is_more_than_bytes(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor follow from more than its memory: a scale, or a conjugate or sign not applied."""
    return tensor.is_quantized or tensor.is_conj() or tensor.is_neg()


def without_objects(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint without what `read_tensor_file` refuses, such as NumPy arrays in the state of a callback.

    One such object would make the whole checkpoint unreadable.
    """
    states = checkpoint.get(CALLBACKS, {})
    kept = {key: value for key, value in checkpoint.items() if key in (*CHECKPOINT_KEYS, CALLBACKS) or _is_kept(value)}
    kept_states = {key: state for key, state in states.items() if _is_kept(state)}
    for name in [*(states.keys() - kept_states.keys()), *(checkpoint.keys() - kept.keys())]:
        warn_once(
            f"Checkpoints do not contain the state of {name}: it has objects other than tensors and plain values, "
            "which are not read back. A resumed run starts without it."
        )
    return {**kept, CALLBACKS: kept_states} if states else kept


def _is_kept(value: Any) -> bool:
    """Whether a value comes back from a file that is loaded with `weights_only=True`."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        return all(_is_kept(one) for item in value.items() for one in item)
    if kind in (list, tuple):
        return all(map(_is_kept, value))
    if value is None or kind in (bool, int, float, str, bytes) or isinstance(value, torch.Tensor):
        return True
    try:
        file = io.BytesIO()
        torch.save(value, file)
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except Exception:
        return False
    return True


@contextmanager
def input_error_when_unreadable(path: Path) -> Iterator[None]:
    """Convert PyTorch's errors for a damaged or unsafe file into an InputError.

    PyTorch's own message recommends `weights_only=False`, which would run code from the file.

    Raises:
        InputError: the file is damaged or contains other objects than tensors and plain values.
    """
    try:
        yield
    except InputError:
        raise
    except UNREADABLE as error:
        if "allocate memory" in str(error):
            raise
        raise InputError(unreadable_message(str(path), error)) from error


def unreadable_message(file: str, error: BaseException) -> str:
    """Return the message, two lines, for a file that cannot be read."""
    text = str(error)
    named = re.search(r"\bGLOBAL ([\w.]+)|: ([\w.]+) is not permitted", text)
    if named or (isinstance(error, pickle.UnpicklingError) and "Unsupported" in text):
        what = f" ({named[1] or named[2]})" if named else ""
        return (
            f"{file} contains objects other than tensors and plain values{what}, which could run code; it was not "
            "read.\nGive a file that contains only weights, preferably as .safetensors."
        )
    return f"{file} is damaged or not a PyTorch file; it was not read.\nCopy it again, or give another."
