"""Slots: partition of this machine's CPU cores and GPUs among parallel jobs."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gpt2lab.errors import InputError

Resource = TypeVar("Resource")
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Slot:
    """Cores and GPUs of one job.

    Attributes:
        cores: core numbers; None: all.
        gpus: GPU ids as in CUDA_VISIBLE_DEVICES; None: all.
    """

    cores: tuple[int, ...] | None = None
    gpus: tuple[str, ...] | None = None

    def environment(self) -> dict[str, str]:
        """Environment variables that make only these GPUs visible."""
        return {} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}


def partition(n_jobs: int, cores: list[int], gpus: list[str]) -> list[Slot]:
    """Partition cores and GPUs evenly into `n_jobs` slots.

    Raises:
        InputError: there are fewer cores or GPUs than jobs; a machine without GPUs is allowed.
    """
    if n_jobs == 1:
        return [Slot()]
    for resources, what in ((cores, "cores"), (gpus, "GPUs")):
        if 0 < len(resources) < n_jobs:
            raise InputError(
                f"n_jobs={n_jobs}: there are {len(resources)} {what}, but each job needs its own.\n"
                f"Give n_jobs={len(resources)} or fewer" + (", or accelerator=cpu." if what == "GPUs" else ".")
            )
    return [Slot(_share(cores, i, n_jobs), _share(gpus, i, n_jobs) if gpus else None) for i in range(n_jobs)]


def _share(resources: list[Resource], part: int, parts: int) -> tuple[Resource, ...]:
    return tuple(resources[len(resources) * part // parts : len(resources) * (part + 1) // parts])


def usable_cores() -> list[int]:
    """Return the numbers of the CPU cores in this process's affinity mask; all cores if there is none."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return list(range(os.cpu_count() or 1))


def usable_gpus() -> list[str]:
    """Return the ids of the GPUs visible to this process, as in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    if not DRIVER.exists():
        return []
    import torch  # takes seconds, so only on a machine with a GPU driver

    return [str(number) for number in range(torch.cuda.device_count())]
