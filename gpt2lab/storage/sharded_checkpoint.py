"""Sharded checkpoint: a folder in PyTorch's distributed format, to which each rank writes its shards of the tensors.

    <folder>/__0_0.distcp …   shards of tensors, one file per rank
    <folder>/.metadata        tensor → position of its shards in the files
    <folder>/rest.pt          everything else, as in a single-file checkpoint

It can be read by another number of ranks than wrote it. `.metadata` is a pickle; only PyTorch's metadata classes are
unpickled from it, and shards are read as tensors only, so no file of the folder can run code.
"""

import io
import os
import pickle
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from gpt2lab.errors import InputError
from gpt2lab.storage.atomic_files import system_errors_behind
from gpt2lab.storage.tensor_file import (
    input_error_when_unreadable,
    read_tensor_file,
    unreadable_message,
    without_objects,
)

METADATA, REST = ".metadata", "rest.pt"
# Classes allowed in `.metadata`, besides torch's dtypes: module → names
METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath"},
    "collections": {"OrderedDict"},
}
STATE, OPTIMIZER, AVERAGE = "state_dict", "optimizer_states", "weight_average"

Checkpoint = dict[str, Any]  # Lightning's checkpoint with one optimizer and optionally the weight average


def is_sharded(path: Path) -> bool:
    """Whether the folder is a complete sharded checkpoint: `.metadata` is written last."""
    return (path / METADATA).is_file()


class _Writer(FileSystemWriter):
    """Writer that raises the underlying OSError; torch's wrapper loses it on the way to other ranks."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            for code, _ in system_errors_behind(error):
                raise OSError(code, os.strerror(code)) from error
            raise


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler restricted to metadata classes."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if not is_dtype and name not in METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{METADATA}: {module}.{name} is not permitted")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """PyTorch's reader, except that `.metadata` cannot run code."""

    def read_metadata(self) -> Metadata:
        file = Path(self.path) / METADATA
        with input_error_when_unreadable(file), file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise InputError(f"{file} contains no checkpoint metadata.\nCopy it again, or give another.")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TensorsOnly(DefaultLoadPlanner):
    """Load planner that refuses pickled bytes, which PyTorch's planner would unpickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise pickle.UnpicklingError(f"Unsupported: {read_item.dest_index.fqn} is stored as a pickle")


def _read(tensors: dict[str, Any], folder: Path, no_dist: bool = False) -> None:
    """Read into `tensors` in place; collective unless `no_dist`.

    Raises:
        InputError: a file of the folder is damaged or has other content.
    """
    try:
        with input_error_when_unreadable(folder):
            distributed_checkpoint.load(
                tensors, storage_reader=_Reader(folder), planner=_TensorsOnly(), no_dist=no_dist
            )
    except CheckpointException as error:  # a BaseException
        _, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, InputError):
            raise cause from error
        raise InputError(unreadable_message(str(folder), cause)) from error


def write_shards(checkpoint: Checkpoint, folder: Path, rank: int) -> None:
    """Write the shards of this rank; collective.

    Raises:
        RuntimeError: on every rank, with the error of the rank that failed as cause.
    """
    rest = without_objects(checkpoint)
    (optimizer,) = rest[OPTIMIZER]
    tensors = {STATE: rest.pop(STATE), OPTIMIZER: optimizer["state"]}
    rest[OPTIMIZER] = [{"param_groups": optimizer["param_groups"]}]
    if AVERAGE in rest:
        tensors[AVERAGE] = _number_tensors(rest.pop(AVERAGE))
    if rank == 0:
        folder.mkdir(exist_ok=True)
        torch.save(rest, folder / REST)
    try:
        distributed_checkpoint.save(tensors, storage_writer=_Writer(folder))
    except CheckpointException as error:  # a BaseException, which callers would not catch
        at_fault, (cause, _) = next(iter(error.failures.items()))
        raise RuntimeError(f"rank {at_fault} could not write its part of {folder}: {cause}") from cause


def read_shards(folder: Path, state: dict[str, Any], optimizer: dict[str, Any], average: list[Tensor]) -> Checkpoint:
    """Read the shards of this rank in place; collective.

    Args:
        state: name → sharded tensor, overwritten.
        optimizer: optimizer state dict by parameter name; its state is overwritten.
        average: averaged weights, overwritten; empty without a weight average.

    Returns:
        The rest of the checkpoint, including the optimizer state.

    Raises:
        InputError: a file of the folder is damaged or has other content.
    """
    _Reader(folder).read_metadata()  # fails on every rank before one waits for the others
    rest = _read_rest(folder)
    tensors = {STATE: state, OPTIMIZER: optimizer["state"]}
    if average:
        tensors[AVERAGE] = _number_tensors(average)
        rest[AVERAGE] = average
    _read(tensors, folder)
    rest[OPTIMIZER][0]["state"] = optimizer["state"]
    return rest


def read_whole(folder: Path) -> Checkpoint:
    """Read the checkpoint with unsharded tensors on the CPU, as from a single file; needs no process group.

    Raises:
        InputError: a file of the folder is damaged or has other content.
    """
    stored = _Reader(folder).read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {
        name: torch.empty(metadata.size, dtype=metadata.properties.dtype)
        for name, metadata in stored.items()
        if isinstance(metadata, TensorStorageMetadata)
    }
    _read(tensors, folder, no_dist=True)
    checkpoint = _read_rest(folder)
    checkpoint[STATE] = _select(tensors, STATE)
    state: dict[str, dict[str, Tensor]] = {}
    for path, tensor in _select(tensors, OPTIMIZER).items():
        parameter, _, name = path.rpartition(".")
        state.setdefault(parameter, {})[name] = tensor
    groups = checkpoint[OPTIMIZER][0]["param_groups"]
    numbers = {name: number for number, name in enumerate(chain(*(group["params"] for group in groups)))}
    checkpoint[OPTIMIZER] = [_rename_parameters(state, groups, numbers)]
    average = _select(tensors, AVERAGE)
    if average:
        checkpoint[AVERAGE] = [average[str(number)] for number in range(len(average))]
    return checkpoint


def _read_rest(folder: Path) -> Checkpoint:
    rest = read_tensor_file(folder / REST)
    if not isinstance(rest, dict) or not rest.get(OPTIMIZER):
        raise InputError(f"{folder / REST} is not part of a checkpoint: it has no {OPTIMIZER}.\nCopy it again.")
    return rest


def optimizer_by_name(state: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return an optimizer's state dict with parameter names instead of numbers.

    Args:
        names: parameter names, group by group; the numbers may be in another order.
    """
    numbers = chain(*(group["params"] for group in state["param_groups"]))
    return _rename_parameters(state["state"], state["param_groups"], dict(zip(numbers, names, strict=True)))


def _rename_parameters(state: dict[Any, Any], groups: list[dict[str, Any]], new: dict[Any, Any]) -> dict[str, Any]:
    return {
        "state": {new[key]: value for key, value in state.items()},
        "param_groups": [{**group, "params": [new[key] for key in group["params"]]} for group in groups],
    }


def _number_tensors(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {str(number): tensor for number, tensor in enumerate(tensors)}


def _select(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{key}."): tensor for name, tensor in tensors.items() if name.startswith(f"{key}.")}
