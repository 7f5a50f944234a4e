"""Memory limit: a run that exceeds the memory of its device ends with a message that names micro_batch."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2lab.errors import InputError
from gpt2lab.storage.checkpoint_ledger import newest_good_checkpoint
from gpt2lab.system.out_of_memory import out_of_memory_reason
from launch.config.run_spec import RunSpec


def validation_batch(spec: RunSpec) -> int:
    """Return the sequences of a validation batch: the largest that fits, but not more than a given micro_batch."""
    given, largest = spec.config.micro_batch, spec.machine.largest_micro_batch
    return largest if given == "auto" else min(largest, int(given))


@contextmanager
def convert_out_of_memory(spec: RunSpec, folder: Path | None = None) -> Iterator[None]:
    """Convert an error for lack of memory.

    Args:
        folder: the run directory; None before it exists.

    Raises:
        InputError: a device has not enough free memory.
    """
    try:
        yield
    except Exception as error:
        reason = out_of_memory_reason(error)
        if not reason or isinstance(error, InputError):
            raise
        raise InputError(_message(spec, folder, reason)) from error


def _message(spec: RunSpec, folder: Path | None, reason: str) -> str:
    machine = spec.machine
    device = "this machine" if machine.accelerator == "cpu" else "the device"
    less = f"micro_batch={machine.micro_batch // 2}"
    first = f"Out of memory on {device} with micro_batch={machine.micro_batch}: {reason}."
    others = "activation_checkpointing=true, a smaller context, or strategy=fsdp; plan=true prints what each saves."
    if machine.micro_batch == 1:
        return f"{first}\nIt is 1 already. Try {others}"
    if folder is not None and newest_good_checkpoint(folder) is not None:
        less = f"python train.py resume={shlex.quote(str(folder))} {less}"
    return f"{first}\nLower it, with the same result up to rounding: {less}\nOr try {others}"
