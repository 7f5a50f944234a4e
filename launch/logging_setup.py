"""Noise: our own log lines reach the terminal, the libraries' that tell a user nothing do not."""

import logging
import os
import sys
import warnings

OWN = ("gpt2lab", "lightning_modules", "datamodules", "callbacks", "launch")
QUIET_WARNINGS = (
    ".*does not have many workers.*",
    ".*`IterableDataset` has `__len__` defined.*",
    ".*GPU available but not used.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*dataloader was created.*",
    ".*max_epochs.*was not set.*",
    ".*Total length of.*is zero.*",
    ".*lr_scheduler.step.*before.*optimizer.step.*",
    ".*weights_only.*",
    ".*Found \\d+ module\\(s\\) in eval mode.*",
    ".*The loaded checkpoint was.*",
    ".*ended before the epoch ended.*",  # our loaders start at the step they are taken up from
    ".*torch.get_autocast_gpu_dtype.*",
    ".*sync_dist=True.*",
    ".*assuming the intent is to load in a single process.*",
    ".*The `srun` command is available.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
)


class _CurrentStderr(logging.Handler):
    """Writes to whatever sys.stderr is now: a progress bar replaces it while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def settle_noise(speaks: bool = True) -> None:
    """Set up logging for this process.

    Args:
        speaks: false on all ranks but the first, which then tell only of errors.
    """
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in OWN:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO if speaks else logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "transformers", "datasets", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def settle_library_noise() -> None:
    """The part that must come after the libraries, which set up their own output while they are imported."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
