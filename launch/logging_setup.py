"""Logging setup: prints this project's log lines on stderr and silences routine messages of libraries."""

import logging
import os
import sys
import warnings

OWN_LOGGERS = ("gpt2lab", "lightning_modules", "datamodules", "callbacks", "launch")
IGNORED_WARNINGS = (
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
    ".*ended before the epoch ended.*",  # after a resume our loaders start in mid-epoch
    ".*torch.get_autocast_gpu_dtype.*",
    ".*sync_dist=True.*",
    ".*assuming the intent is to load in a single process.*",
    ".*The `srun` command is available.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
)


class _CurrentStderr(logging.Handler):
    """Handler for the current `sys.stderr`, which a progress bar replaces while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def announce(work: str) -> None:
    """Print what a program begins to do, if it runs in a terminal, where it would be silent for seconds."""
    if sys.stderr.isatty():
        print(f"{work} …", file=sys.stderr, flush=True)


def configure_logging(is_main: bool = True) -> None:
    """Set the log levels, warning filters and environment variables that control output.

    Args:
        is_main: whether this process is rank 0; the other ranks log errors only.
    """
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in OWN_LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO if is_main else logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "transformers", "datasets", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def silence_cpu_profiler() -> None:
    """Disable the lines that PyTorch's profiler prints at its start and end; on a GPU they include its errors."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # above its highest


def silence_libraries() -> None:
    """Disable the progress bars and info logs that transformers and Lightning enable at import; call it after that."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
