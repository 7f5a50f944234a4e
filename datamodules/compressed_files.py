"""Compressed files: binary streams that decompress .gz and .zst."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gpt2lab.errors import InputError

COMPRESSED_ENDINGS = {".gz", ".zst"}
BLOCK = 128 * 1024


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
    import zstandard

    ending = file.suffix.lower()
    try:
        with file.open("rb") as raw:
            if ending == ".gz":
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw))
            elif ending == ".zst":
                yield io.BufferedReader(_Blocks(_decompress(raw)))
            else:
                yield raw
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"Cannot read {file}: {reason}.\nFix or remove the file.") from error


def _decompress(raw: IO[bytes]) -> Iterator[bytes]:
    """Yield the content of all Zstandard frames; zstandard's own reader does not detect a truncated file."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    while block := raw.read(BLOCK):
        while block:
            if frame.eof:
                frame = decompressor.decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("the compressed data end early")


class _Blocks(io.RawIOBase):
    """Raw stream over an iterator of blocks."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = block
        taken = self._rest[: len(buffer)]
        self._rest = self._rest[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)
