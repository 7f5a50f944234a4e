"""Out of memory: recognizes the errors of a device, the allocator of the host and libraries that lack free memory."""

import errno

TEXTS = ("out of memory", "can't allocate memory", "cannot allocate memory", "unable to allocate", "alloc_failed")


def out_of_memory_reason(error: BaseException | None) -> str:
    """Return the line of an error that is about memory, or of one behind it; empty for all other errors.

    torch.compile and other libraries wrap the error of the allocator.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        lines = [line for line in str(error).splitlines() if any(text in line.lower() for text in TEXTS)]
        is_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        if is_memory or (lines and isinstance(error, RuntimeError)):
            return _shorten(lines[0] if lines else "no free memory")
        error = error.__cause__ or error.__context__
    return ""


def _shorten(line: str) -> str:
    """Keep what was requested: the allocators add advice and, on a CPU, the place in their source."""
    if "DefaultCPUAllocator: " in line:
        line = line.partition("DefaultCPUAllocator: ")[2].partition(" Error code")[0]
    sentences = line.removeprefix("CUDA out of memory. ").split(". ")
    return ". ".join(sentences[:2]).rstrip(".")
