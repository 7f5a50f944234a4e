"""Documents: iterate over the text of files, of installed Python source, and of Hub data sets.

A corpus can be iterated repeatedly and has an identity that changes when its documents change.
"""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.compressed_files import COMPRESSED_ENDINGS, plain_ending
from datamodules.record_files import file_records
from datamodules.records import RecordFault, Row, value_text
from datamodules.text_decoding import open_text
from gpt2lab.errors import InputError
from gpt2lab.storage.damaged_files import warn_once
from gpt2lab.storage.path_patterns import matching_paths

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

    Attributes:
        key: the text or its beginning, so that equal texts are on the same side.
        path: file of source code, relative to the corpus.
    """

    key: str
    text: str
    continues: bool = False
    path: str = ""


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
            try:
                with open_text(path, newline=None) as stream:
                    text = stream.read()
            except InputError as error:  # the user cannot fix an installed file
                warn_once(f"{str(error).splitlines()[0].rstrip('.')}; the file is skipped")
                continue
            if text.strip():
                yield Document(text, text, path=path.relative_to(root).as_posix())

    return Corpus(name, {"files": files_identity(files, root)}, documents, size=total_size(files))


def text_corpus(path: str, val_path: str, text_column: str, on_bad_line: str) -> Corpus:
    """Return the corpus of a file, folder or glob of .txt .md .rst .py .jsonl .parquet, each also as .gz or .zst.

    A text file or a record is one document. Its side of the split depends on its text (the first piece of a long one),
    not on its path. Files of `val_path` are never trained on.

    Raises:
        InputError: no such path, no readable file, or an invalid record.
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
    ending = plain_ending(file)
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
    """Yield the documents of a file: one per text file or per record, a long one in pieces.

    Raises:
        InputError: the file is unreadable or not text, or a record is invalid and `on_bad_line` is stop.
    """
    if file_ending(file) not in RECORD_ENDINGS:
        with open_text(file) as stream:
            yield from text_pieces(iter(partial(stream.read, PIECE_CHARACTERS), ""))
        return
    for text in file_records(file, on_bad_line, partial(column_text, column=text_column)):
        yield from record_document(text)


def column_text(row: Row, name: str, column: str) -> str:
    """Return the text of a record's column.

    Raises:
        RecordFault: there is no such column, or its value is not text.
    """
    fix = "Name the text column: data.text_column=NAME"
    if column not in row:
        raise RecordFault(f"no column {column!r}", f".\nColumns found: {', '.join(row)}", fix)
    try:
        return value_text(row[column], name)
    except RecordFault as fault:
        raise RecordFault(f"{column!r} is {fault.reason}", fault.detail, fault.fix or fix) from fault


def record_document(text: str) -> Iterator[Document]:
    """Yield the document of a record in pieces; nothing for an empty one."""
    return text_pieces(text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS))


def text_pieces(blocks: Iterable[str]) -> Iterator[Document]:
    """Yield a document, of which these are successive blocks, in pieces; nothing for one without visible text."""
    key, rest = "", ""
    for block in blocks:
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
