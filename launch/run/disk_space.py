"""Disk space: checks before training that a run's checkpoints fit on the disk."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gpt2lab.errors import InputError
from gpt2lab.storage.atomic_files import full_disk_message
from gpt2lab.storage.checkpoint_ledger import recovery_hint
from launch.config import run_dir
from launch.config.run_dir import RunDirectory
from launch.config.run_spec import RunSpec

IN_A_CHECKPOINT = ("weights", "optimizer state", "averaged weights")
FIXED_BYTES = 20_000_000  # metrics, samples, W&B, report


@dataclass(frozen=True)
class RunFiles:
    """Sizes of the files that a run writes.

    Attributes:
        checkpoint: bytes of one.
        kept: how many stay.
        export: bytes of the Hugging Face folder.
    """

    checkpoint: int
    kept: int
    export: int

    @property
    def left(self) -> int:
        """Bytes of checkpoints and export once the run has ended."""
        return self.kept * self.checkpoint + self.export

    @property
    def most(self) -> int:
        """Bytes at most: each is written beside the one whose place it takes. Reports and the like are in it."""
        return FIXED_BYTES + (self.kept + 1) * self.checkpoint + 2 * self.export


def check(spec: RunSpec, vocab_size: int, folder: Path | None) -> None:
    """Compare what the run will write with what is free on the disk of its directory.

    Args:
        folder: the directory of a resumed run.

    Raises:
        InputError: too little.
    """
    place = folder or run_dir.run_folder(spec.config)
    while not place.exists():
        place = place.parent
    needed = run_files(spec, vocab_size).most
    free = shutil.disk_usage(place).free
    if free < needed:
        fix = recovery_hint(str(folder)) if folder else "Free some, or set run_dir= to another disk."
        raise InputError(
            f"No space left for this run: it writes up to {needed / 1e6:,.0f} MB, "
            f"{place.resolve()} has {free / 1e6:,.0f} MB.\n{fix}"
        )


@contextmanager
def convert_full_disk(directory: RunDirectory) -> Iterator[None]:
    """Turn a failure for lack of disk space into an InputError that names the file and the run's intact checkpoint."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        folder = str(directory.path or "")
        message = full_disk_message(error, where=folder)
        if not message:
            raise
        raise InputError(f"{message}\n{recovery_hint(folder)}") from error


def run_files(spec: RunSpec, vocab_size: int) -> RunFiles:
    """Return what a run writes; a checkpoint holds the parts of all ranks."""
    from launch.memory.memory_plan import memory_plan
    from launch.memory.memory_terms import lora_parameters, parameters
    from launch.memory.run_sizes import run_sizes

    config = spec.config
    sizes = replace(run_sizes(config, spec.resolved, spec.machine, vocab_size), sharded=False)
    parts = memory_plan(sizes).parts
    embedding = sizes.shape.vocab_size * sizes.shape.n_embd * sizes.weight_bytes
    tied = embedding if spec.machine.strategy == "fsdp" else 0  # written as the LM head too
    is_best = config.export == "best"  # whose checkpoint is kept too, and saved at any validation
    saves = math.ceil(config.steps / min(config.checkpoint_every, config.validate_every if is_best else math.inf))
    callback = config.callbacks.get("checkpoint")
    return RunFiles(
        checkpoint=sum(parts[name] for name in IN_A_CHECKPOINT) + tied,
        kept=min(callback.get("keep_last", 2) + is_best, saves) if callback else 0,
        export=4 * (parameters(sizes.shape) + lora_parameters(sizes)),
    )
