"""Text of files and byte strings: detects the encoding, decompresses and decodes.

The encoding is that of the byte order mark, else UTF-16 or UTF-32 where the bytes are such text, else UTF-8, else
Latin-1, with a notice. Latin-1 is read as its superset Windows-1252. Data with NUL or many control bytes are binary.
"""

import codecs
import functools
import io
import itertools
import re
import tokenize
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datamodules.compressed_files import open_decompressed, plain_ending
from gpt2lab.errors import InputError
from gpt2lab.storage.damaged_files import warn_once

UTF8 = "utf-8-sig"  # UTF-8 that may begin with a byte order mark
BLOCK = 128 * 1024  # bytes read at a time
MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF8, UTF8),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CONTROLS = bytes({*range(32), 127} - {*b"\a\b\t\n\v\f\r\x1b"})  # not in text, as for file(1)
HIGH = bytes(range(128, 256))
VISIBLE = bytes(range(32, 127))
WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
SAMPLE = 8192  # bytes in which they are recognised
INVALID = re.compile("[\udc80-\udcff]")  # undecodable bytes under surrogateescape
LATIN1_BYTES = "latin-1-bytes"  # error handler
BINARY = "binary data, not text"


class NotTextError(ValueError):
    """Bytes that are not text.

    Attributes:
        reason, detail: what they are, and how that is known.
        line: the line from 1; 0: no single one.
    """

    def __init__(self, reason: str, detail: str, line: int = 0) -> None:
        super().__init__(f"{reason} ({detail})")
        self.reason, self.detail, self.line = reason, detail, line


@dataclass(frozen=True)
class Encoding:
    """Python's name of an encoding, and a notice if the bytes may have another one."""

    name: str
    notice: str = ""


def _as_latin1(error: UnicodeError) -> tuple[str, int]:
    """Decode one undecodable byte; Windows-1252 leaves five bytes undefined."""
    assert isinstance(error, UnicodeDecodeError)
    byte = error.object[error.start : error.start + 1]
    return byte.decode("cp1252", "ignore") or byte.decode("latin-1"), error.start + 1


codecs.register_error(LATIN1_BYTES, _as_latin1)


@contextmanager
def open_text(file: Path, newline: str | None = "", records: bool = False) -> Iterator[io.TextIOWrapper]:
    """Open a file, also .gz or .zst, as a stream of its text, without a byte order mark.

    Args:
        newline: as for `open`; by default line ends are kept.
        records: a NUL or control byte is the fault of its record, unless the file begins as binary data.

    Raises:
        InputError: the file is unreadable or not text.
    """
    stat = file.stat() if file.exists() else None
    encoding = _file_encoding(file, records, stat and (stat.st_size, stat.st_mtime_ns))
    if encoding.notice:
        warn_once(f"{file}: {encoding.notice}. If that is wrong, convert it: iconv -f ENCODING -t UTF-8")
    with open_decompressed(file) as stream:
        yield io.TextIOWrapper(stream, encoding.name, LATIN1_BYTES, newline)


def decode(data: bytes) -> tuple[str, str]:
    """Return (text, notice or "") of bytes that are the whole text.

    Raises:
        NotTextError: they are not text.
    """
    encoding = detect_encoding(iter([data]))
    return data.decode(encoding.name, LATIN1_BYTES), encoding.notice


@functools.cache
def _file_encoding(file: Path, records: bool, version: tuple[int, int] | None) -> Encoding:
    """Return the encoding of a file in this version (size, time).

    Raises:
        InputError: the file is unreadable or not text.
    """
    with open_decompressed(file) as stream:
        try:
            encoding = detect_encoding(iter(functools.partial(stream.read, BLOCK), b""), records)
        except NotTextError as error:
            place = f"{file}:{error.line}" if error.line else str(file)
            raise InputError(f"{place}: {error}.\nRemove the file, or convert it to text in UTF-8.") from error
    declared = _declared_encoding(file) if encoding.notice else ""
    return Encoding(declared) if declared else encoding


def _declared_encoding(file: Path) -> str:
    """Return the encoding besides UTF-8 that Python source declares in its first two lines, if any."""
    if plain_ending(file) != ".py":
        return ""
    with open_decompressed(file) as stream:
        try:
            declared = tokenize.detect_encoding(stream.readline)[0]
            return "" if declared.startswith("utf-8") or b"".decode(declared) else declared
        except (SyntaxError, LookupError):  # no such encoding, or not one of text
            return ""


def detect_encoding(blocks: Iterator[bytes], records: bool = False) -> Encoding:
    """Detect the encoding of text, all of which is read.

    Args:
        records: refuse many control bytes only at the beginning, in most lines.

    Raises:
        NotTextError: NUL bytes or many control bytes, or invalid UTF-16 or UTF-32.
    """
    head = next(blocks, b"")
    marked = next((name for mark, name in MARKS if head.startswith(mark)), "")
    name = marked or _unmarked(head[:SAMPLE]) or UTF8
    if records and name == UTF8:
        _refuse_binary_lines(head)
    decoder = codecs.getincrementaldecoder(name)()
    size = high = controls = invalid = first_invalid = 0
    line = 1
    for block in itertools.chain([head], blocks, [b""]):
        try:
            text = decoder.decode(block, not block)
        except UnicodeDecodeError as error:
            if name != UTF8:
                line += error.object[: error.start].decode(error.encoding, "ignore").count("\n")
                raise NotTextError("damaged text", f"invalid {name.upper()}", line) from error
            decoder.errors = "surrogateescape"
            text = decoder.decode(block, not block)
        if decoder.errors != "strict" and (found := INVALID.findall(text)):
            first_invalid = first_invalid or line + text.count("\n", 0, text.index(found[0]))
            invalid += len(found)
        data = block if name == UTF8 else text.encode()
        if 0 in data and not records:
            raise NotTextError(BINARY, "a NUL byte", line + data[: data.index(0)].count(b"\n"))
        size, controls, high = size + len(data), controls + _count(data, CONTROLS), high + _count(data, HIGH)
        line += text.count("\n")
    if not records and _many(controls, size):
        raise NotTextError(BINARY, f"{controls} of {size} bytes are control bytes")
    if not invalid:
        return Encoding(name)
    if marked or invalid < high - invalid:
        return Encoding(UTF8, f"invalid UTF-8, first in line {first_invalid} ({invalid} in all), is read as Latin-1")
    return Encoding("cp1252", f"not UTF-8, first in line {first_invalid}, so it is read as Latin-1")


def _refuse_binary_lines(head: bytes) -> None:
    lines = head.split(b"\n")
    odd = sum(_count(line, CONTROLS) > 0 for line in lines)
    if odd * 2 > len(lines) and _many(_count(head, CONTROLS), len(head)):
        raise NotTextError(BINARY, f"control bytes in {odd} of the first {len(lines)} lines")


def _unmarked(head: bytes) -> str:
    """Return the name of UTF-16 or UTF-32 if bytes without a byte order mark are such text, else an empty string.

    The wrong byte order mixes scripts, and its letters are from many blocks of 256.
    """
    if not _may_be_wide(head):
        return ""
    readings: dict[str, tuple[int, ...]] = {}
    for name in WIDE:
        try:
            text = codecs.getincrementaldecoder(name)().decode(head)
        except UnicodeDecodeError:
            continue
        unprintable = sum(unicodedata.category(one) in ("Cc", "Cn", "Co") and not one.isspace() for one in text)
        scripts = {unicodedata.name(one, "").split(" ")[0] for one in text if one.isalpha()}
        blocks = {ord(one) // 256 for one in text}
        if text and not _many(unprintable, len(text)):
            readings[name] = (name in WIDE[2:], unprintable, len(scripts), len(blocks), -sum(map(str.isascii, text)))
    return min(readings, key=readings.__getitem__, default="")


def _may_be_wide(head: bytes) -> bool:
    """Whether bytes are neither 8-bit text, perhaps with NUL bytes, nor UTF-8."""
    nuls, controls, visible, high = head.count(0), *(_count(head, kind) for kind in (CONTROLS, VISIBLE, HIGH))
    try:
        is_utf8 = high > 0 and bool(codecs.getincrementaldecoder("utf-8")().decode(head, len(head) < SAMPLE))
    except UnicodeDecodeError:
        is_utf8 = False
    has_other_controls = _many(controls - nuls, len(head))
    return not is_utf8 and (has_other_controls or (nuls > 0 and visible * 10 <= len(head) * 7))


def _count(data: bytes, kind: bytes) -> int:
    return len(data) - len(data.translate(None, kind))


def _many(odd: int, size: int) -> bool:
    """Whether there are more odd bytes or letters than in text: 2 % and one."""
    return odd * 50 > size + 50
