"""Checkpoint IO: write checkpoints without a second copy, or hold a copy that another thread writes."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from gpt2lab.storage.sharded_checkpoint import is_sharded, read_whole
from gpt2lab.storage.tensor_file import copy_to_cpu, read_checkpoint_file, without_objects, write_tensor_file

log = logging.getLogger(__name__)


@dataclass
class HeldCheckpoint:
    """Given as `storage_options` of a save, it receives a copy of the checkpoint on the CPU; no file is written."""

    content: dict[str, Any] = field(default_factory=dict)


class StreamingCheckpointIO(TorchCheckpointIO):
    """Checkpoint IO that writes directly to the file, not first to memory as Lightning's does, and reads shards.

    Args:
        run_dir: files outside of it are not removed; a ModelCheckpoint takes the names of its files from a checkpoint.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        kept = without_objects(checkpoint)
        if isinstance(storage_options, HeldCheckpoint):
            storage_options.content = copy_to_cpu(kept)
        else:
            write_tensor_file(kept, Path(path))

    def load_checkpoint(self, path: str | Path, *arguments: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return read_whole(Path(path)) if is_sharded(Path(path)) else read_checkpoint_file(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        if not Path(path).resolve().is_relative_to(self.run_dir.resolve()):
            log.warning("%s is kept, since it is outside the run directory.", path)
            return
        super().remove_checkpoint(path)


class BackgroundWrite:
    """One write at a time in another thread; the process ends after it."""

    def __init__(self) -> None:
        self._pending: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Start a write; the one before has been waited for."""
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending = executor.submit(write)
        executor.shutdown(wait=False)

    @property
    def is_pending(self) -> bool:
        """Whether a write has been started and not been waited for."""
        return self._pending is not None

    @property
    def has_failed(self) -> bool:
        """Whether the write has ended with an error, which `wait` raises."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait until nothing is being written; a wait that a signal interrupts can be repeated.

        Raises:
            BaseException: the error of the write.
        """
        pending = self._pending
        if pending is not None:
            wait([pending])
            self._pending = None
            pending.result()
