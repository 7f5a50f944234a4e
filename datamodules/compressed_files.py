"""Compressed files: binary streams that decompress .gz and .zst."""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gpt2lab.errors import InputError

COMPRESSED_ENDINGS = {".gz", ".zst"}


def plain_ending(file: Path) -> str:
    """Return a file's ending in lower case without that of compression: .jsonl of a.jsonl.gz."""
    endings = [ending.lower() for ending in file.suffixes]
    if endings and endings[-1] in COMPRESSED_ENDINGS:
        endings.pop()
    return endings[-1] if endings else ""


@contextmanager
def open_decompressed(file: Path) -> Iterator[IO[bytes]]:
    """Open a file as a binary stream of its decompressed content.

    Raises:
        InputError: the file is unreadable, or the compressed data are damaged or truncated.
    """
    ending = file.suffix.lower()
    try:
        with file.open("rb") as raw:
            if ending == ".gz":
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw))
            elif ending == ".zst":
                yield io.BufferedReader(_zstd_stream(raw))
            else:
                yield raw
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"Cannot read {file}: {reason}.\nFix or remove the file.") from error


def _zstd_stream(raw: IO[bytes]) -> Any:
    """Decompress all Zstandard frames; Arrow's stream, unlike others, raises an error at a truncated one."""
    import pyarrow as pa

    if not os.fstat(raw.fileno()).st_size:
        raise EOFError("the compressed data end early")
    return pa.CompressedInputStream(raw, "zstd")
