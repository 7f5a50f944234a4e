"""Space: whether a run's checkpoints fit on the disk, asked before training and not after it."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gpt2lab.errors import InputError
from gpt2lab.storage.atomic_files import told_when_full
from gpt2lab.storage.checkpoint_ledger import what_is_kept
from launch.config import run_dir
from launch.config.schema import Config

IN_A_CHECKPOINT = ("weights", "optimizer state", "averaged weights")
FIXED_BYTES = 20_000_000  # metrics, samples, W&B, report


@dataclass(frozen=True)
class RunFiles:
    """What a run writes.

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


def check(config: Config, vocab_size: int) -> None:
    """Compare what the run will write with what is free where it will lie.

    Raises:
        InputError: too little.
    """
    folder = Path(config.run_dir).expanduser() if config.run_dir else run_dir.wanted_folder(config)
    while not folder.exists():
        folder = folder.parent
    needed = run_files(config, vocab_size).most
    free = shutil.disk_usage(folder).free
    if free < needed:
        cure = what_is_kept(config.resume) if config.resume else "Free some, or set run_dir= to another disk."
        raise InputError(
            f"No space left for this run: it writes up to {needed / 1e6:,.0f} MB, "
            f"{folder.resolve()} has {free / 1e6:,.0f} MB.\n{cure}"
        )


@contextmanager
def told_with_checkpoint(config: Config) -> Iterator[None]:
    """Turn a failure for lack of disk space into an InputError that names the file and the run's intact checkpoint."""
    with told_when_full("", lambda: what_is_kept(config.run_dir or ""), config.run_dir or ""):
        yield


def run_files(config: Config, vocab_size: int) -> RunFiles:
    """Of a configuration whose automatic choices are settled; a checkpoint holds what all ranks share out."""
    from launch.memory.memory_plan import memory_plan
    from launch.memory.memory_terms import lora_parameters, parameters
    from launch.memory.run_sizes import run_sizes

    sizes = replace(run_sizes(config, vocab_size), sharded=False)
    parts = memory_plan(sizes).parts
    embedding = sizes.shape.vocab_size * sizes.shape.n_embd * sizes.weight_bytes
    tied = embedding if config.strategy == "fsdp" else 0  # gathered, or by parts, it is written as the LM head, too
    saves = math.ceil(config.steps / config.checkpoint_every)
    callback = config.callbacks.get("checkpoint")
    return RunFiles(
        checkpoint=sum(parts[name] for name in IN_A_CHECKPOINT) + tied,
        kept=min(callback.get("keep_last", 2), saves) if callback else 0,
        export=4 * (parameters(sizes.shape) + lora_parameters(sizes)),
    )
