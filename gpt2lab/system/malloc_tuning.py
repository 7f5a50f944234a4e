"""malloc tuning: keep freed host memory in the process, so that the next training step can reuse it."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make malloc reuse freed memory; return whether the C library supports it (glibc).

    By default glibc maps every large tensor again and the kernel zeroes its pages, which takes a tenth to a quarter of
    a CPU training step at a vocabulary of 50,257 (docs/performance.md). The cost: the process keeps its peak memory.

    Source: mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, LARGEST))


def release_freed_memory() -> None:
    """Return freed memory to the kernel now; for memory of other threads' arenas, which this thread does not reuse.

    Source: malloc_trim(3).
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)
