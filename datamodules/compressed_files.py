"""Files as binary streams, decompressed on the way where their names end in .gz or .zst."""

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


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """A binary stream of the file's content, decompressed.

    Raises:
        InputError: not readable, or the compressed data are damaged or end early.
    """
    import zstandard

    ending = file.suffix.lower()
    try:
        with file.open("rb") as raw:
            if ending == ".gz":
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw))
            elif ending == ".zst":
                yield io.BufferedReader(_Blocks(_decompressed(raw)))
            else:
                yield raw
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"Cannot read {file}: {reason}.\nMend or leave out the file.") from error


def _decompressed(raw: IO[bytes]) -> Iterator[bytes]:
    """The content of all Zstandard frames; zstandard's own reader takes a file that was cut short for a whole one."""
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
    """A stream that reads from blocks."""

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
