"""Content-addressed cache of prepared data: built once under a lock, never used incomplete."""

import fcntl
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from gpt2lab.errors import InputError
from gpt2lab.storage.atomic_files import NO_SPACE, can_write, input_error_when_full, replaced_folder, write_json
from gpt2lab.storage.stored_weights import UNREADABLE

log = logging.getLogger(__name__)

LEDGER = "ledger.json"
_BUILDS = ContextVar("builds", default=True)


class NotPreparedError(Exception):
    """Data are not in the cache."""


def cache_folder(configured: str | None = None) -> Path:
    """Return the configured folder, else $GPT2LAB_CACHE, else ~/.cache/gpt2lab."""
    return Path(configured or os.environ.get("GPT2LAB_CACHE") or "~/.cache/gpt2lab").expanduser()


def content_hash(content: Any) -> str:
    """Return the SHA-256 (hex) of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def get_or_build(
    kind: str, name: str, key: dict[str, Any], build: Callable[[Path], dict[str, Any]], cache_dir: Path
) -> Path:
    """Return the folder `<cache_dir>/<kind>/<name>-<hash of key>`; call `build` if it is missing or damaged.

    `build(scratch)` fills a scratch folder and returns facts for the ledger. The ledger also contains the size of every
    file; it is written last, then the scratch folder is renamed. So a killed build is never used, and a folder with
    truncated files is rebuilt. Processes that request the same folder wait for the one that builds it.

    Raises:
        InputError: the cache cannot be written, no space is left, or whatever `build` raises.
        NotPreparedError: it is to be built, within `without_building`.
    """
    folder = cache_dir / kind / f"{name}-{content_hash(key)[:12]}"
    if is_prepared(folder):
        return folder
    if not _BUILDS.get():
        raise NotPreparedError(str(folder))
    full = "The incomplete folder is removed. Free some space, or use another cache folder: cache_dir=FOLDER"
    with input_error_when_full(f"prepared data to {folder}", full), _lock(folder) as is_locked:
        if not is_prepared(folder):
            with replaced_folder(folder, "" if is_locked else secrets.token_hex(4)) as scratch:
                facts = build(scratch)
                sizes = {str(file.relative_to(scratch)): file.stat().st_size for file in _files_in(scratch)}
                write_json(scratch / LEDGER, {**facts, "key": key, "sizes": sizes})
    return folder


@contextmanager
def open_growing_folder(kind: str, name: str, key: dict[str, Any], what: str, cache_dir: Path) -> Iterator[Path]:
    """Yield the folder `<cache_dir>/<kind>/<name>-<hash of key>` to append to, locked for one process at a time.

    Unlike the folders of `get_or_build` it is never complete: its files record what they contain. key.json contains
    `key`. A folder that cannot be written is yielded as it is, for reading.

    Args:
        what: description of the data, for messages.

    Raises:
        InputError: the cache cannot be written, or no space is left.
    """
    folder = cache_dir / kind / f"{name}-{content_hash(key)[:12]}"
    full = "Written data is kept. Free some space and start again, or use another cache folder: cache_dir=FOLDER"
    if folder.is_dir() and not can_write(folder):
        with _input_error_when_unwritable(folder):
            yield folder
        return
    with input_error_when_full(f"{what} {folder}", full), _lock(folder):
        folder.mkdir(exist_ok=True)
        write_json(folder / "key.json", key)
        yield folder


@contextmanager
def without_building() -> Iterator[None]:
    """Let `get_or_build` raise NotPreparedError in this block instead of building."""
    token = _BUILDS.set(False)
    try:
        yield
    finally:
        _BUILDS.reset(token)


def is_prepared(folder: Path) -> bool:
    """Whether the folder has a whole ledger and its files have the recorded sizes."""
    try:
        ledger = read_ledger(folder)
        are_whole = all((folder / name).stat().st_size == size for name, size in ledger["sizes"].items())
        return are_whole and isinstance(ledger["key"], dict)
    except UNREADABLE:
        return False


def read_ledger(folder: Path) -> dict[str, Any]:
    """Return the facts from `build`, with the folder's key under "key" and file sizes in bytes under "sizes"."""
    return json.loads((folder / LEDGER).read_text(encoding="utf-8"))


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Lock a folder of the cache for this process; wait for another process that has it.

    Yields whether it is locked; where the file system has no locks, a warning is logged.

    Raises:
        InputError: the cache cannot be written.
    """
    with _input_error_when_unwritable(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(f"{folder}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            yield _is_locked(descriptor, folder)
        finally:
            os.close(descriptor)


def _is_locked(descriptor: int, folder: Path) -> bool:
    """Lock an open file until it is closed; return False where that is not possible."""
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("waiting for another process that prepares %s", folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        log.warning("%s: this file system cannot lock (%s). Prepare no data twice at once.", folder, error.strerror)
        return False
    return True


@contextmanager
def _input_error_when_unwritable(folder: Path) -> Iterator[None]:
    """Convert an error of a file or folder in the cache into an InputError, except that of a full disk.

    Args:
        folder: a folder of the cache; files beside it count too.

    Raises:
        InputError: the cache cannot be written.
    """
    try:
        yield
    except OSError as error:
        cache, file = folder.parent.parent, Path(str(error.filename))
        if error.errno in NO_SPACE or not (file.is_relative_to(cache) or cache.is_relative_to(file)):
            raise
        raise InputError(
            f"Cannot write prepared data to {folder.parent}: {error.strerror}.\n"
            "Choose another folder: cache_dir=FOLDER, or the environment variable GPT2LAB_CACHE"
        ) from error


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
