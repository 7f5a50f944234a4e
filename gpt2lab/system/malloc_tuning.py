"""Host memory: keeps what a training step frees for the next step, instead of giving it back to the kernel."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have this process reuse freed memory; says whether the C library can (glibc).

    By default glibc maps every large tensor anew and the kernel zeroes its pages again, which at a vocabulary of 50,257
    takes a quarter of a training step on a CPU (docs/performance.md). The price is that the process keeps its peak of
    memory until it ends.

    Source: mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, LARGEST))


def give_back_freed_memory() -> None:
    """Give the kernel what was freed, once: for what no later allocation would find, as another thread allocated it.

    Source: malloc_trim(3).
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)
