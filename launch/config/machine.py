"""Slots: the parts of this machine that jobs run in at the same time, each with cores and GPUs of its own."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gpt2lab.errors import InputError

Thing = TypeVar("Thing")
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Slot:
    """Cores by number and GPUs as CUDA_VISIBLE_DEVICES names them; None: whatever the machine has."""

    cores: tuple[int, ...] | None = None
    gpus: tuple[str, ...] | None = None

    def environment(self) -> dict[str, str]:
        """Variables that show a process only this slot's GPUs."""
        return {} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}


def partition(n_jobs: int, cores: list[int], gpus: list[str]) -> list[Slot]:
    """As many slots as jobs run at once, sharing out all cores and GPUs as evenly as they go.

    Raises:
        InputError: fewer cores, or fewer but some GPUs, than jobs.
    """
    if n_jobs == 1:
        return [Slot()]
    for things, what in ((cores, "cores"), (gpus, "GPUs")):
        if 0 < len(things) < n_jobs:
            raise InputError(
                f"n_jobs={n_jobs}: there are {len(things)} {what}, and each job needs one of its own.\n"
                f"Give n_jobs={len(things)} or fewer" + (", or accelerator=cpu." if what == "GPUs" else ".")
            )
    return [Slot(_share(cores, i, n_jobs), _share(gpus, i, n_jobs) if gpus else None) for i in range(n_jobs)]


def _share(things: list[Thing], part: int, parts: int) -> tuple[Thing, ...]:
    return tuple(things[len(things) * part // parts : len(things) * (part + 1) // parts])


def usable_cores() -> list[int]:
    """Numbers of the cores that this process may use; counted from 0 where the system does not tell."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # only Linux tells
        return list(range(os.cpu_count() or 1))


def usable_gpus() -> list[str]:
    """The GPUs that this process sees, by the names that CUDA_VISIBLE_DEVICES gives them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    if not DRIVER.exists():
        return []
    import torch  # seconds, and only a machine with a driver needs to ask

    return [str(number) for number in range(torch.cuda.device_count())]
