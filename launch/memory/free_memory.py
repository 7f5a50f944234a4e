"""Free memory: how many bytes a run may still take on one of its devices."""

import re
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
# (limit, use) of this process's control group, versions 2 and 1
GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def free_bytes(accelerator: str) -> int | None:
    """Bytes that this machine's first device, or its host memory for a CPU, can still give; None: nobody says."""
    if accelerator == "gpu":
        return torch.cuda.mem_get_info()[0]
    return host_free_bytes() if accelerator == "cpu" else None


def host_free_bytes(meminfo: Path = MEMINFO, groups: tuple[tuple[Path, Path], ...] = GROUPS) -> int | None:
    """The least of what the kernel counts as available and what is left of the control group's limit."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    left = [int(found[1]) * 1024] if found else []
    for limit, use in groups:
        most = limit.read_text().strip() if limit.is_file() and use.is_file() else "max"
        if most.isdecimal():
            left.append(max(int(most) - int(use.read_text()), 0))
    return min(left, default=None)
