"""Space: whether a run's checkpoints fit on the disk, asked before training and not after it."""

import shutil
from pathlib import Path

from gpt2lab.errors import InputError
from gpt2lab.model_folder import parameters_of
from launch.configuration.config import Config
from launch.running import run_folders

# Weights and two optimizer moments in fp32, for two kept checkpoints and the one being written; two exports
BYTES_PER_PARAMETER = 3 * 12 + 2 * 4
FIXED_BYTES = 20_000_000  # metrics, samples, W&B, report


def check(config: Config, vocab_size: int) -> None:
    """Compare what the run will write with what is free where it will lie.

    Raises:
        InputError: too little.
    """
    folder = Path(config.run_dir).expanduser() if config.run_dir else run_folders.wanted_folder(config)
    while not folder.exists():
        folder = folder.parent
    needed = bytes_needed(config, vocab_size)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"No space left for this run: it writes up to {needed / 1e9:.1f} GB, "
            f"{folder.resolve()} has {free / 1e9:.1f} GB.\nFree some, or set run_dir= to another disk."
        )


def bytes_needed(config: Config, vocab_size: int) -> int:
    """Upper bound of what a run's checkpoints and exports take."""
    return FIXED_BYTES + BYTES_PER_PARAMETER * parameters_of({**vars(config.model), "vocab_size": vocab_size})
