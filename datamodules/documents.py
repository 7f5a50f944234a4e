"""Documents: the text of files, of installed Python source, and of Hub data sets, one after another.

A corpus gives its documents as often as asked and an identity that changes whenever they would.
"""

import gzip
import hashlib
import io
import json
import logging
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import IO, Any

from gpt2lab.errors import InputError

log = logging.getLogger(__name__)

TEXT_ENDINGS = {".txt", ".md", ".py", ".rst"}
RECORD_ENDINGS = {".jsonl", ".parquet"}
KNOWN_ENDINGS = frozenset(TEXT_ENDINGS | RECORD_ENDINGS)
COMPRESSED_ENDINGS = {".gz", ".zst"}
PIECE_CHARACTERS = 64 * 1024  # a longer text file becomes several documents, cut at line ends
HASHED_BYTES = 256 * 2**20  # up to this size a corpus is known by its content, beyond by names, sizes and times
TEST_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Document:
    """`key` decides on which side of the training/validation split the text lies."""

    key: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Where documents come from; `validation` is None where the corpus has no validation part of its own."""

    name: str
    identity: dict[str, Any]
    documents: Callable[[], Iterator[Document]]
    validation: Callable[[], Iterator[Document]] | None = None


def stdlib_corpus() -> Corpus:
    """The Python standard library of the running interpreter, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if not TEST_FOLDERS & set(path.relative_to(root).parts[:-1])]
    return _source_corpus("stdlib", root, files)


def packages_corpus() -> Corpus:
    """The Python source of the packages installed in this environment."""
    root = Path(sysconfig.get_paths()["purelib"])
    return _source_corpus("packages", root, sorted(root.rglob("*.py")))


def _source_corpus(name: str, root: Path, files: list[Path]) -> Corpus:
    if not files:
        raise InputError(
            f"data={name}: no Python source below {root} (python {sys.version.split()[0]}); use data=text."
        )

    def documents() -> Iterator[Document]:
        for path in files:
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield Document(path.relative_to(root).as_posix(), text)

    return Corpus(name, {"files": files_identity(files, root)}, documents)


def text_corpus(path: str, val_path: str, text_column: str, on_bad_line: str) -> Corpus:
    """Files, folders or globs of .txt .md .rst .py .jsonl .parquet, each also as .gz or .zst.

    Raises:
        InputError: nothing there, no readable file among them, a broken line, or a missing column.
    """
    if not path:
        raise InputError("data=text needs path=FILE, FOLDER or GLOB, for example: data=text path='notes/*.md'")
    files = find_files(path, "path")

    def reader(files: list[Path]) -> Callable[[], Iterator[Document]]:
        return lambda: (doc for file in files for doc in file_documents(file, text_column, on_bad_line))

    identity: dict[str, Any] = {"files": files_identity(files), "column": text_column, "on_bad_line": on_bad_line}
    validation = None
    if val_path:
        val_files = find_files(val_path, "val_path")
        identity["val_files"] = files_identity(val_files)
        validation = reader(val_files)
    return Corpus("text", identity, reader(files), validation)


def find_files(path: str, key: str, endings: frozenset[str] = KNOWN_ENDINGS) -> list[Path]:
    """The readable files of these endings that a file name, folder or glob stands for, sorted.

    Raises:
        InputError: no such path, or no file of a known ending.
    """
    given = Path(path).expanduser()
    if given.is_file():
        if kind_of(given, endings) is None:
            raise InputError(f"{key}={path}: unknown kind of file.\nKnown: {_in_words(endings)}.")
        return [given]
    if given.is_dir():
        found = [file for file in given.rglob("*") if file.is_file()]
    elif has_magic(path):
        found = [Path(name) for name in glob(str(given), recursive=True) if Path(name).is_file()]  # noqa: PTH207 — any root
    else:
        raise InputError(f"{key}={path}: no such file or folder.\nGive an existing file, folder or glob.")
    files = sorted(file for file in found if kind_of(file, endings))
    if not files:
        raise InputError(f"{key}={path}: no readable file among {len(found)}.\nKnown kinds: {_in_words(endings)}.")
    return files


def kind_of(file: Path, known: frozenset[str] = KNOWN_ENDINGS) -> str | None:
    """The ending that tells how to read a file, compression aside; None for kinds that are not read."""
    endings = [ending.lower() for ending in file.suffixes]
    if endings and endings[-1] in COMPRESSED_ENDINGS:
        endings.pop()
    ending = endings[-1] if endings else ""
    return ending if ending in known else None


def _in_words(endings: frozenset[str]) -> str:
    return f"{' '.join(sorted(endings))}, each also with {' '.join(sorted(COMPRESSED_ENDINGS))}"


def files_identity(files: list[Path], root: Path | None = None) -> str:
    """SHA-256 over names and content; over names, sizes and modification times where the files are large together."""
    by_content = sum(file.stat().st_size for file in files) <= HASHED_BYTES
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(root) if root else file.resolve()
        digest.update(f"{name}\0".encode(errors="surrogateescape"))
        if by_content:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        else:
            digest.update(f"{file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()


def file_documents(file: Path, text_column: str, on_bad_line: str) -> Iterator[Document]:
    """The documents of one file: a text file is one (a long one several), a record file one a row."""
    if kind_of(file) not in RECORD_ENDINGS:
        yield from _text_pieces(file)
        return
    for number, row in file_records(file, on_bad_line):
        if text_column not in row:
            raise InputError(
                f"{file}:{number}: no column {text_column!r}.\nColumns there: {', '.join(map(str, row))}.\n"
                "Name the text column: data.text_column=NAME"
            )
        if row[text_column] and str(row[text_column]).strip():
            yield Document(f"{file.name}#{number}", str(row[text_column]))


def _text_pieces(file: Path) -> Iterator[Document]:
    """Bytes that are no UTF-8 are read as the replacement character."""
    smallest = (
        max(file.stat().st_size // 20, 1024) if file.suffix.lower() not in COMPRESSED_ENDINGS else PIECE_CHARACTERS
    )
    with opened(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", errors="replace")
        number = 0
        while lines := text.readlines(min(PIECE_CHARACTERS, smallest)):
            piece = "".join(lines)
            if piece.strip():
                yield Document(f"{file.name}#{number}", piece)
            number += 1


def file_records(file: Path, on_bad_line: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line or row number from 1, record) of a .jsonl or .parquet file.

    Raises:
        InputError: a line is no JSON object and `on_bad_line` is stop; a parquet file cannot be read.
    """
    if kind_of(file) == ".parquet":
        yield from _parquet_records(file)
        return
    skipped = 0
    with opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                problem = "" if isinstance(record, dict) else "a JSON value that is no object"
            except ValueError as error:
                problem = f"no JSON ({error})"
            if not problem:
                yield number, record
            elif on_bad_line == "stop":
                raise InputError(
                    f"{file}:{number}: {problem}.\nMend the line, or leave such lines out: on_bad_line=skip"
                )
            else:
                skipped += 1
    if skipped:
        log.warning("%s: %d broken lines left out", file, skipped)


def _parquet_records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file}: no readable parquet file ({str(error).splitlines()[0]}).") from error


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """A binary stream of the file's content, decompressed.

    Raises:
        InputError: not readable, or the compressed data are damaged.
    """
    import zstandard

    ending = file.suffix.lower()
    try:
        with file.open("rb") as raw:
            if ending == ".gz":
                yield gzip.GzipFile(fileobj=raw)
            elif ending == ".zst":
                yield io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw))
            else:
                yield raw
    except (PermissionError, gzip.BadGzipFile, EOFError, zstandard.ZstdError) as error:
        raise InputError(f"Cannot read {file}: {error}.\nMend or leave out the file.") from error
