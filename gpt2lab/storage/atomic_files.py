"""Files and folders that appear whole or not at all: written aside, flushed to the disk, then renamed into place."""

import ctypes
import errno
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2lab.errors import InputError
from gpt2lab.storage.damaged_files import is_no_folder, set_aside

log = logging.getLogger(__name__)

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AT_FDCWD = -100  # linux/fcntl.h: paths are relative to the working directory
RENAME_EXCHANGE = 2  # linux/fs.h: swap the two names in one step


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file that holds `text`. A reader sees the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
    with naming_full_file(path):
        try:
            aside.write_text(text, encoding="utf-8")
            flush(aside)
            _make_way(path)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        flush(path.parent)


def write_json(path: Path, content: Any) -> None:
    """As `write_text`, for JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def point_symlink(link: Path, target_name: str) -> None:
    """Make `link` point at a neighbour, replacing an older link in one step."""
    aside = link.with_name(f".{link.name}.tmp")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target_name)
    _make_way(link)
    aside.replace(link)


def _make_way(path: Path) -> None:
    """Set a folder aside that has the name of a file, whose place no file could take."""
    if path.is_dir() and not path.is_symlink():
        log.warning("%s is a folder. It was renamed to %s.", path, set_aside(path).name)


def can_write(folder: Path) -> bool:
    """Whether a file can be created in a folder: one without a name is, since `access` is wrong for root and on NFS."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Fill a scratch folder that becomes `folder` when the block ends; on an exception the old `folder` stays.

    On Linux the two folders change names in one step, so `folder` always exists once it has existed; elsewhere there
    is an instant without it.
    """
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for path in [*scratch.rglob("*"), scratch]:
            flush(path)
        if is_no_folder(folder):
            log.warning("%s is no folder. It was renamed to %s.", folder, set_aside(folder).name)
        if not folder.exists():
            scratch.rename(folder)
        elif not _exchange(scratch, folder):
            folder.rename(folder.with_name(f".{folder.name}.old"))
            scratch.rename(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(folder.with_name(f".{folder.name}.old"), ignore_errors=True)


@contextmanager
def naming_full_file(path: Path) -> Iterator[None]:
    """Give an error for lack of disk space the name of the file, which a failed write lacks."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE and str(error.filename or ".tmp").endswith(".tmp"):  # .tmp: a scratch file of ours
            error.filename = str(path)
        raise


@contextmanager
def told_when_full(what: str, kept: str | Callable[[], str], where: str = "") -> Iterator[None]:
    """Turn a failure for lack of disk space into an InputError that names what was written and what is still there.

    Args:
        what: is written in the block; empty: the name of the file, see `naming_full_file`.
        where: the folder that is named where the name of the file is not known.
        kept: the lines that follow; a function is called only when the disk is full.

    Raises:
        InputError: the disk or the quota is full.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        message = full_disk_message(error, what, where)
        if not message:
            raise
        raise InputError(f"{message}\n{kept if isinstance(kept, str) else kept()}") from error


def full_disk_message(error: BaseException, what: str = "", where: str = "") -> str:
    """One line that names what could not be written; empty unless lack of disk space is behind the error."""
    full = [(code, file) for code, file in system_errors_behind(error) if code in NO_SPACE]
    if not full:
        return ""
    file = next((file for _, file in reversed(full) if file), "")
    written = what or file or (f"a file in {where}" if where else "a file")
    return f"No space left to write {written}: {os.strerror(full[-1][0])}."


def system_errors_behind(error: BaseException | None) -> Iterator[tuple[int, str]]:
    """(error number, file name or nothing) of the system's errors that led to this one, the last one first.

    torch and safetensors report failed writes as errors of their own.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno:
            yield error.errno, str(error.filename or "")
        elif told := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors, which is written in Rust
            yield int(told.group(1)), ""
        error = error.__cause__ or error.__context__


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; says whether this system and file system can."""
    if not sys.platform.startswith("linux"):
        return False
    rename = ctypes.CDLL(None, use_errno=True).renameat2
    return rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0
