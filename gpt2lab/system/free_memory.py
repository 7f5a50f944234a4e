"""Free memory of a device: CUDA free memory, or available host memory within the cgroup limit."""

import re
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
# (limit, usage) of this process's control group, cgroup v2 and v1
CGROUP_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def free_bytes(accelerator: str) -> int | None:
    """Free bytes of the first GPU, or of host memory for a CPU; None if unknown."""
    if accelerator == "gpu":
        return torch.cuda.mem_get_info()[0]
    return host_free_bytes() if accelerator == "cpu" else None


def host_free_bytes(meminfo: Path = MEMINFO, cgroups: tuple[tuple[Path, Path], ...] = CGROUP_FILES) -> int | None:
    """Minimum of MemAvailable and what remains of the cgroup limit; None if neither is known."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="utf-8")) if meminfo.exists() else None
    free = [int(found[1]) * 1024] if found else []
    for limit, usage in cgroups:
        limit_bytes = limit.read_text().strip() if limit.is_file() and usage.is_file() else "max"
        if limit_bytes.isdecimal():
            free.append(max(int(limit_bytes) - int(usage.read_text()), 0))
    return min(free, default=None)
