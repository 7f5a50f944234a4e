"""Resident memory of this process as Linux counts it: now, and its peak since a mark. Needs nothing but Python."""

import re
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """What the process holds now."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most it has held since it started, or since the last `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> int:
    """Let the peak count anew from what is held now, which is returned.

    Source: proc_pid_clear_refs(5).
    """
    CLEAR.write_text("5")
    return resident_bytes()


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024
