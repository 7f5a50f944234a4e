"""Sharded checkpoint: a folder to which each rank writes its own parts of the tensors, in PyTorch's distributed format.

    <folder>/__0_0.distcp …   parts of tensors, a file for each rank
    <folder>/.metadata        which part of which tensor lies where
    <folder>/rest.pt          everything else, as in a checkpoint that is one file

Any number of ranks reads what any number has written. `.metadata` is a pickle, of which only PyTorch's own classes of
metadata are built, and a shard gives tensors alone: no file of the folder can run code.
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
from gpt2lab.storage.tensor_file import read_tensor_file, refusal, unreadable_is_refused

METADATA, REST = ".metadata", "rest.pt"
# What `.metadata` is made of, besides the dtypes of torch: module → names
IN_METADATA = {
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

Checkpoint = dict[str, Any]  # what Lightning saves, with one optimizer and, where it is kept, the weight average


def is_sharded(path: Path) -> bool:
    """Whether this is a sharded checkpoint, and whole: the metadata are written last."""
    return (path / METADATA).is_file()


class _Writer(FileSystemWriter):
    """Fails with the system's error, which stands behind torch's own and is lost on the way to other ranks."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            for code, _ in system_errors_behind(error):
                raise OSError(code, os.strerror(code)) from error
            raise


class _MetadataUnpickler(pickle.Unpickler):
    """Builds nothing but metadata."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if not is_dtype and name not in IN_METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"{METADATA}: {module}.{name} is not permitted")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """PyTorch's, except that `.metadata` cannot run code."""

    def read_metadata(self) -> Metadata:
        file = Path(self.path) / METADATA
        with unreadable_is_refused(file), file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise InputError(f"{file} holds no metadata of a checkpoint.\nCopy it again, or give another.")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TensorsOnly(DefaultLoadPlanner):
    """PyTorch's would unpickle what the metadata call bytes instead of a tensor."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise pickle.UnpicklingError(f"Unsupported: {read_item.dest_index.fqn} is stored as a pickle")


def _read(tensors: dict[str, Any], folder: Path, no_dist: bool = False) -> None:
    """Read into tensors; every rank must call it, unless `no_dist`.

    Raises:
        InputError: a file of the folder is damaged or holds something else.
    """
    try:
        with unreadable_is_refused(folder):
            distributed_checkpoint.load(
                tensors, storage_reader=_Reader(folder), planner=_TensorsOnly(), no_dist=no_dist
            )
    except CheckpointException as error:  # which is no Exception
        _, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, InputError):
            raise cause from error
        raise InputError(refusal(str(folder), cause)) from error


def write_shards(checkpoint: Checkpoint, folder: Path, rank: int) -> None:
    """Write the parts that this rank holds; every rank must call it.

    Raises:
        RuntimeError: on every rank, from what went wrong on one.
    """
    rest = dict(checkpoint)
    (optimizer,) = rest[OPTIMIZER]
    tensors = {STATE: rest.pop(STATE), OPTIMIZER: optimizer["state"]}
    rest[OPTIMIZER] = [{"param_groups": optimizer["param_groups"]}]
    if AVERAGE in rest:
        tensors[AVERAGE] = _numbered(rest.pop(AVERAGE))
    if rank == 0:
        folder.mkdir(exist_ok=True)
        torch.save(rest, folder / REST)
    try:
        distributed_checkpoint.save(tensors, storage_writer=_Writer(folder))
    except CheckpointException as error:  # which is no Exception, and nobody would take it for what it tells of
        at_fault, (cause, _) = next(iter(error.failures.items()))
        raise RuntimeError(f"rank {at_fault} could not write its part of {folder}: {cause}") from cause


def read_shards(folder: Path, state: dict[str, Any], optimizer: dict[str, Any], average: list[Tensor]) -> Checkpoint:
    """Read into the parts of tensors that this rank is to hold; every rank must call it.

    Args:
        state: name → sharded tensor, overwritten.
        optimizer: its state by parameter name, overwritten, with its parameter groups.
        average: the averaged weights, overwritten; empty where none are kept.

    Returns:
        The rest of the checkpoint; its optimizer has its state, too.

    Raises:
        InputError: a file of the folder is damaged or holds something else.
    """
    _Reader(folder).read_metadata()  # on every rank before any waits for the others
    rest = _rest(folder)
    tensors = {STATE: state, OPTIMIZER: optimizer["state"]}
    if average:
        tensors[AVERAGE] = _numbered(average)
        rest[AVERAGE] = average
    _read(tensors, folder)
    rest[OPTIMIZER][0]["state"] = optimizer["state"]
    return rest


def read_whole(folder: Path) -> Checkpoint:
    """The checkpoint with whole tensors on the CPU, as if it had been written to one file; in any process alone.

    Raises:
        InputError: a file of the folder is damaged or holds something else.
    """
    stored = _Reader(folder).read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {
        name: torch.empty(of.size, dtype=of.properties.dtype)
        for name, of in stored.items()
        if isinstance(of, TensorStorageMetadata)
    }
    _read(tensors, folder, no_dist=True)
    checkpoint = _rest(folder)
    checkpoint[STATE] = _below(tensors, STATE)
    state: dict[str, dict[str, Tensor]] = {}
    for path, tensor in _below(tensors, OPTIMIZER).items():
        name, _, what = path.rpartition(".")
        state.setdefault(name, {})[what] = tensor
    groups = checkpoint[OPTIMIZER][0]["param_groups"]
    numbers = {name: number for number, name in enumerate(chain(*(group["params"] for group in groups)))}
    checkpoint[OPTIMIZER] = [_renamed(state, groups, numbers)]
    average = _below(tensors, AVERAGE)
    if average:
        checkpoint[AVERAGE] = [average[str(number)] for number in range(len(average))]
    return checkpoint


def _rest(folder: Path) -> Checkpoint:
    rest = read_tensor_file(folder / REST)
    if not isinstance(rest, dict) or not rest.get(OPTIMIZER):
        raise InputError(f"{folder / REST} is no part of a checkpoint: it has no {OPTIMIZER}.\nCopy it again.")
    return rest


def optimizer_by_name(state: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """An optimizer's state dict with parameter names instead of numbers.

    Args:
        names: of its parameters, group by group; the numbers' own order may be another.
    """
    numbers = chain(*(group["params"] for group in state["param_groups"]))
    return _renamed(state["state"], state["param_groups"], dict(zip(numbers, names, strict=True)))


def _renamed(state: dict[Any, Any], groups: list[dict[str, Any]], to: dict[Any, Any]) -> dict[str, Any]:
    return {
        "state": {to[key]: of for key, of in state.items()},
        "param_groups": [{**group, "params": [to[key] for key in group["params"]]} for group in groups],
    }


def _numbered(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {str(number): tensor for number, tensor in enumerate(tensors)}


def _below(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{key}."): tensor for name, tensor in tensors.items() if name.startswith(f"{key}.")}
