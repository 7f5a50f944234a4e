"""Atomic writes of files and folders: written to a scratch path, flushed to the disk, then renamed into place."""

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
from gpt2lab.storage.damaged_files import is_not_folder, set_aside

log = logging.getLogger(__name__)

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SCRATCH_NAME = re.compile(r"\..+\.\d+\.tmp", re.ASCII)  # of `write_text`
AT_FDCWD = -100  # linux/fcntl.h: paths are relative to the working directory
RENAME_EXCHANGE = 2  # linux/fs.h: swap the two names in one step


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file that contains `text`. A reader sees the old file or the new one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
    with add_filename_when_full(path):
        try:
            scratch.write_text(text, encoding="utf-8")
            flush(scratch)
            _move_folder_aside(path)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
        flush(path.parent)


def delete_scratch_files(folder: Path) -> None:
    """Delete the scratch files that killed calls of `write_text` have left in a folder that no process writes to."""
    for entry in folder.iterdir():
        if SCRATCH_NAME.fullmatch(entry.name) and entry.is_file():
            entry.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON with `write_text`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def point_symlink(link: Path, target_name: str) -> None:
    """Make `link` point at a file of the same folder, replacing an older link atomically."""
    scratch = link.with_name(f".{link.name}.tmp")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(target_name)
    _move_folder_aside(link)
    scratch.replace(link)


def _move_folder_aside(path: Path) -> None:
    """Rename a folder that has the name of a file to be written; a file cannot replace a folder."""
    if path.is_dir() and not path.is_symlink():
        log.warning("%s is a folder. It was renamed to %s.", path, set_aside(path).name)


def can_write(folder: Path) -> bool:
    """Whether a file can be created in a folder. Tries it, because `os.access` is wrong for root and on NFS."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@contextmanager
def replaced_folder(folder: Path, writer: str = "") -> Iterator[Path]:
    """Yield a scratch folder that replaces `folder` when the block ends; after an exception the old `folder` stays.

    On Linux the two folders are exchanged atomically; on other systems `folder` is missing for an instant.

    Args:
        writer: name of this process in that of the scratch folder, where another one may write the same folder.
    """
    scratch = folder.with_name(f".{folder.name}.{writer}tmp")
    if scratch.is_symlink():
        scratch.unlink()
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for path in [*scratch.rglob("*"), scratch]:
            flush(path)
        if is_not_folder(folder):
            log.warning("%s is not a folder. It was renamed to %s.", folder, set_aside(folder).name)
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
def add_filename_when_full(path: Path) -> Iterator[None]:
    """Add the file name to an OSError for a full disk; a failed write does not set it."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE and str(error.filename or ".tmp").endswith(".tmp"):  # .tmp: one of our scratch files
            error.filename = str(path)
        raise


@contextmanager
def input_error_when_full(what: str, kept: str | Callable[[], str]) -> Iterator[None]:
    """Convert an error caused by a full disk into an InputError: what could not be written, what is still intact.

    Args:
        what: description of what the block writes; empty: the file name, see `add_filename_when_full`.
        kept: the following lines of the message; a function is called only when the disk is full.

    Raises:
        InputError: the disk or the quota is full.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        message = full_disk_message(error, what)
        if not message:
            raise
        raise InputError(f"{message}\n{kept if isinstance(kept, str) else kept()}") from error


def full_disk_message(error: BaseException, what: str = "", where: str = "") -> str:
    """Return one line that names what could not be written; empty if a full disk did not cause the error."""
    full = [(code, file) for code, file in system_errors_behind(error) if code in NO_SPACE]
    if not full:
        return ""
    file = next((file for _, file in reversed(full) if file), "")
    written = what or file or (f"a file in {where}" if where else "a file")
    return f"No space left to write {written}: {os.strerror(full[-1][0])}."


def system_errors_behind(error: BaseException | None) -> Iterator[tuple[int, str]]:
    """Yield (errno, file name or "") of each OSError in the chain of causes, newest first.

    torch and safetensors wrap failed writes in their own exceptions.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno:
            yield error.errno, str(error.filename or "")
        elif found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors, which is written in Rust
            yield int(found.group(1)), ""
        error = error.__cause__ or error.__context__


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths atomically; return whether the system and file system support it."""
    if not sys.platform.startswith("linux"):
        return False
    rename = ctypes.CDLL(None, use_errno=True).renameat2
    return rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0
