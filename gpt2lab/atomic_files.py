"""Files and folders that appear whole or not at all: written aside, flushed to the disk, then renamed into place."""

import ctypes
import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2lab.errors import InputError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AT_FDCWD = -100  # linux/fcntl.h: paths are relative to the working directory
RENAME_EXCHANGE = 2  # linux/fs.h: swap the two names in one step


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file that holds `text`. A reader sees the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
    try:
        aside.write_text(text, encoding="utf-8")
        flush(aside)
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
    aside.replace(link)


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
def told_when_full(what: str, kept: str) -> Iterator[None]:
    """Turn a failure for lack of disk space into an InputError that says what was written and what is still there.

    Raises:
        InputError: the disk or the quota is full.
    """
    try:
        yield
    except Exception as error:
        code = os_error_behind(error)
        if code not in NO_SPACE:
            raise
        raise InputError(f"No space left to write {what}: {os.strerror(code)}.\n{kept}") from error


def os_error_behind(error: BaseException | None) -> int:
    """The system's error number: torch and safetensors report failed writes as errors of their own; 0 where none is."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if told := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors, which is written in Rust
            return int(told.group(1))
        error = error.__cause__ or error.__context__
    return 0


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; says whether this system and file system can."""
    if not sys.platform.startswith("linux"):
        return False
    rename = ctypes.CDLL(None, use_errno=True).renameat2
    return rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0
