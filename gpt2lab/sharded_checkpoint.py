"""Sharded checkpoint: a folder to which each rank writes its own parts of the tensors, in PyTorch's distributed format.

    <folder>/__0_0.distcp …   parts of tensors, a file for each rank
    <folder>/.metadata        which part of which tensor lies where
    <folder>/rest.pt          everything else, as in a checkpoint that is one file

Any number of ranks reads what any number has written. `.metadata` is a pickle: take up only folders that you trust.
"""

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from gpt2lab.atomic_files import system_errors_behind

REST = "rest.pt"
STATE, OPTIMIZER, AVERAGE = "state_dict", "optimizer_states", "weight_average"

Checkpoint = dict[str, Any]  # what Lightning saves, with one optimizer and, where it is kept, the weight average


def is_sharded(path: Path) -> bool:
    """Whether this is a sharded checkpoint, and whole: the metadata are written last."""
    return (path / ".metadata").is_file()


class _Writer(FileSystemWriter):
    """Fails with the system's error, which stands behind torch's own and is lost on the way to other ranks."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            for code, _ in system_errors_behind(error):
                raise OSError(code, os.strerror(code)) from error
            raise


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
    """
    rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
    tensors = {STATE: state, OPTIMIZER: optimizer["state"]}
    if average:
        tensors[AVERAGE] = _numbered(average)
        rest[AVERAGE] = average
    distributed_checkpoint.load(tensors, checkpoint_id=folder)
    rest[OPTIMIZER][0]["state"] = optimizer["state"]
    return rest


def read_whole(folder: Path) -> Checkpoint:
    """The checkpoint with whole tensors on the CPU, as if it had been written to one file; in any process alone."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {
        name: torch.empty(of.size, dtype=of.properties.dtype)
        for name, of in stored.items()
        if isinstance(of, TensorStorageMetadata)
    }
    distributed_checkpoint.load(tensors, checkpoint_id=folder, no_dist=True)
    checkpoint = torch.load(folder / REST, map_location="cpu", weights_only=True)
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
