"""Documents: iterate over the text of files, of installed Python source, and of Hub data sets.

A corpus can be iterated repeatedly and has an identity that changes when its documents change.
"""

import hashlib
import io
import json
import logging
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.compressed_files import COMPRESSED_ENDINGS, open_decompressed
from gpt2lab.errors import InputError
from gpt2lab.storage.path_patterns import matching_paths

log = logging.getLogger(__name__)

TEXT_ENDINGS = {".txt", ".md", ".py", ".rst"}
RECORD_ENDINGS = {".jsonl", ".parquet"}
KNOWN_ENDINGS = frozenset(TEXT_ENDINGS | RECORD_ENDINGS)
PIECE_CHARACTERS = 64 * 1024  # longer text files are split into pieces of about this size
KEY_CHARACTERS = 32 * 1024  # beginning of a text that is hashed for the split
LONGEST_PIECE = 2**20  # maximum size of a piece without a line end
HASHED_BYTES = 64 * 2**20  # a larger corpus is identified by names, sizes and times instead of its content
NOT_STDLIB = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class Document:
    """Text with a key, whose hash determines the side of the training/validation split.

    A long document is split into pieces with the same key; `continues` marks all but the first.
    """

    key: str
    text: str
    continues: bool = False


@dataclass(frozen=True)
class Corpus:
    """Source of documents.

    Attributes:
        identity: JSON value that changes when the documents change; part of the cache key.
        validation: separate validation documents; None if they are split off by hash.
        size: approximate size in bytes, for progress bars; 0 if unknown.
    """

    name: str
    identity: dict[str, Any]
    documents: Callable[[], Iterator[Document]]
    validation: Callable[[], Iterator[Document]] | None = None
    size: int = 0


def stdlib_corpus() -> Corpus:
    """Return the corpus of the interpreter's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return _source_corpus("stdlib", root, _files_below(root, NOT_STDLIB))


def packages_corpus() -> Corpus:
    """Return the corpus of the Python packages installed in this environment."""
    root = Path(sysconfig.get_paths()["purelib"])
    return _source_corpus("packages", root, _files_below(root))


def _source_corpus(name: str, root: Path, found: list[Path]) -> Corpus:
    files = [file for file in found if file.suffix == ".py"]
    if not files:
        raise InputError(
            f"data={name}: no Python source below {root} (python {sys.version.split()[0]}); use data=text."
        )

    def documents() -> Iterator[Document]:
        for path in files:
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield Document(path.relative_to(root).as_posix(), text)

    return Corpus(name, {"files": files_identity(files, root)}, documents, size=total_size(files))


def text_corpus(path: str, val_path: str, text_column: str, on_bad_line: str) -> Corpus:
    """Return the corpus of a file, folder or glob of .txt .md .rst .py .jsonl .parquet, each also as .gz or .zst.

    A text file or a record is one document. Its side of the split depends on its text (the first piece of a long one),
    not on its path. Files of `val_path` are never trained on.

    Raises:
        InputError: no such path, no readable file, an invalid line, or a missing column.
    """
    if not path:
        raise InputError("data=text needs path=FILE, FOLDER or GLOB, for example: data=text path='notes/*.md'")
    files = find_files(path, "path")

    def reader(files: list[Path]) -> Callable[[], Iterator[Document]]:
        return lambda: (doc for file in files for doc in file_documents(file, text_column, on_bad_line))

    validation, identity = None, {"column": text_column, "on_bad_line": on_bad_line}
    if val_path:
        val_files = find_files(val_path, "val_path")
        held_out = {file.resolve() for file in val_files}
        files = [file for file in files if file.resolve() not in held_out]
        if not files:
            raise InputError(
                f"path={path} contains no other file than val_path={val_path}; give separate training text."
            )
        identity["val_files"] = files_identity(val_files)
        validation = reader(val_files)
    identity["files"] = files_identity(files)
    size = 0 if any(file.suffix.lower() in COMPRESSED_ENDINGS for file in files) else total_size(files)
    return Corpus("text", identity, reader(files), validation, size)


def find_files(path: str, key: str, endings: frozenset[str] = KNOWN_ENDINGS) -> list[Path]:
    """Return the files with these endings of a file name, folder or glob, sorted.

    Raises:
        InputError: no such path, or no file of a known ending.
    """
    given, found = Path(path).expanduser(), matching_paths(path)
    if not found:
        raise InputError(f"{key}={path}: no such file or folder.\nGive an existing file, folder or glob.")
    if given.is_file() and file_ending(given, endings) is None:
        raise InputError(f"{key}={path}: unknown kind of file.\nKnown: {_list_endings(endings)}.")
    if given.is_dir():
        found = _files_below(given)
    files = [file for file in found if file_ending(file, endings) and file.is_file()]
    if not files:
        raise InputError(f"{key}={path}: no readable file among {len(found)}.\nKnown kinds: {_list_endings(endings)}.")
    return files


def _files_below(root: Path, skipped: frozenset[str] = frozenset()) -> list[Path]:
    """Return all files below a folder, sorted, except in hidden folders such as .git and in `skipped` ones."""
    found: list[Path] = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in skipped and not name.startswith(".")]
        found.extend(path for name in names if (path := Path(folder, name)).is_file())
    return sorted(found)


def total_size(files: list[Path]) -> int:
    """Return the total file size in bytes."""
    return sum(file.stat().st_size for file in files)


def file_ending(file: Path, known: frozenset[str] = KNOWN_ENDINGS) -> str | None:
    """Return a file's ending without that of compression; None for an unknown one."""
    endings = [ending.lower() for ending in file.suffixes]
    if endings and endings[-1] in COMPRESSED_ENDINGS:
        endings.pop()
    ending = endings[-1] if endings else ""
    return ending if ending in known else None


def _list_endings(endings: frozenset[str]) -> str:
    return f"{' '.join(sorted(endings))}, each also with {' '.join(sorted(COMPRESSED_ENDINGS))}"


def files_identity(files: list[Path], root: Path | None = None) -> str:
    """Return the SHA-256 of the files' content and, with `root`, of their relative names.

    Above 64 MiB in total it is computed from paths, sizes and modification times, because hashing would delay the
    start.
    """
    by_content = total_size(files) <= HASHED_BYTES
    digest = hashlib.sha256()
    for file in files:
        if not by_content:
            known = f"{file.resolve()}\0{file.stat().st_size}\0{file.stat().st_mtime_ns}\0"
        else:
            known = f"{file.relative_to(root) if root else ''.join(file.suffixes[-2:])}\0"
            try:
                digest.update(hashlib.sha256(file.read_bytes()).digest())
            except OSError as error:
                raise InputError(f"Cannot read {file}: {error.strerror}.\nFix or remove the file.") from error
        digest.update(known.encode(errors="surrogateescape"))
    return digest.hexdigest()


def file_documents(file: Path, text_column: str, on_bad_line: str) -> Iterator[Document]:
    """Yield the documents of a file: one per text file (a long one in pieces) or per record.

    Raises:
        InputError: the file is unreadable, a line is invalid, or the column is missing.
    """
    if file_ending(file) not in RECORD_ENDINGS:
        yield from _text_pieces(file)
        return
    for number, row in file_records(file, on_bad_line):
        if text_column not in row:
            raise InputError(
                f"{file}:{number}: no column {text_column!r}.\nColumns found: {', '.join(map(str, row))}.\n"
                "Name the text column: data.text_column=NAME"
            )
        yield from record_document(row[text_column])


def record_document(value: Any) -> Iterator[Document]:
    """Yield the document of a record's text column; nothing for an empty one."""
    text = str(value or "").encode("utf-8", "replace").decode()  # JSON may contain lone surrogates
    if text.strip():
        yield Document(text[:KEY_CHARACTERS], text)


def _text_pieces(file: Path) -> Iterator[Document]:
    """Yield a text file in pieces; invalid UTF-8 becomes the replacement character, a byte order mark is dropped."""
    with open_decompressed(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
        key, rest = "", ""
        while block := text.read(PIECE_CHARACTERS):
            rest += block
            if len(rest) < PIECE_CHARACTERS:
                continue
            cut = _last_cut(rest) or (len(rest) if len(rest) >= LONGEST_PIECE else 0)
            if not cut:
                continue
            piece, rest = rest[:cut], rest[cut:]
            if key or piece.strip():
                yield Document(key or piece[:KEY_CHARACTERS], piece, continues=bool(key))
                key = key or piece[:KEY_CHARACTERS]
        if rest and (key or rest.strip()):
            yield Document(key or rest[:KEY_CHARACTERS], rest, continues=bool(key))


def _last_cut(text: str) -> int:
    """Return the last position where a text can be split without changing GPT-2's tokens, before a line end; else 0.

    The pre-tokenizer never joins a visible character with following whitespace, so no token spans this position.
    """
    line_end = text.rfind("\n", 0, -1)
    return len(text[:line_end].rstrip()) if line_end > 0 else 0


def file_records(file: Path, on_bad_line: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line or row number from 1, record) of a .jsonl or .parquet file.

    Raises:
        InputError: a line is not a JSON object and `on_bad_line` is stop, or a parquet file is unreadable.
    """
    if file_ending(file) == ".parquet":
        yield from _parquet_records(file)
        return
    skipped = 0
    with open_decompressed(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                problem = "" if isinstance(record, dict) else "not a JSON object"
            except ValueError as error:
                problem = f"invalid JSON ({error})"
            if not problem:
                yield number, record
            elif on_bad_line == "stop":
                raise InputError(f"{file}:{number}: {problem}.\nFix the line, or skip such lines: on_bad_line=skip")
            else:
                skipped += 1
    if skipped:
        log.warning("%s: skipped %d invalid lines", file, skipped)


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
        raise InputError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]}).") from error
