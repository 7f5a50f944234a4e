"""Resident set of this process on Linux: now, and its peak since a reset. Needs only Python."""

import re
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Return the current resident set in bytes."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """Return the peak resident set in bytes since the start or the last `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> int:
    """Reset the peak to the current resident set and return that.

    Source: proc_pid_clear_refs(5).
    """
    CLEAR.write_text("5")
    return resident_bytes()


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024
