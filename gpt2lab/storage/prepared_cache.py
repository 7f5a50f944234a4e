"""Content-addressed cache of prepared data: built once under a lock, never used incomplete."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpt2lab.errors import InputError
from gpt2lab.storage.atomic_files import input_error_when_full, replaced_folder, write_json

log = logging.getLogger(__name__)

LEDGER = "ledger.json"


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
    """
    folder = cache_dir / kind / f"{name}-{content_hash(key)[:12]}"
    if is_prepared(folder):
        return folder
    full = "The incomplete folder is removed. Free some space, or use another cache folder: cache_dir=FOLDER"
    with input_error_when_full(f"prepared data to {folder}", full), _lock(folder):
        if not is_prepared(folder):
            with replaced_folder(folder) as scratch:
                facts = build(scratch)
                sizes = {str(file.relative_to(scratch)): file.stat().st_size for file in _files_in(scratch)}
                write_json(scratch / LEDGER, {**facts, "key": key, "sizes": sizes})
    return folder


@contextmanager
def open_growing_folder(kind: str, name: str, key: dict[str, Any], what: str, cache_dir: Path) -> Iterator[Path]:
    """Yield the folder `<cache_dir>/<kind>/<name>-<hash of key>` to append to, locked for one process at a time.

    Unlike the folders of `get_or_build` it is never complete: its files record what they contain. key.json contains
    `key`.

    Args:
        what: description of the data, for messages.

    Raises:
        InputError: the cache cannot be written, or no space is left.
    """
    folder = cache_dir / kind / f"{name}-{content_hash(key)[:12]}"
    full = "Written data is kept. Free some space and start again, or use another cache folder: cache_dir=FOLDER"
    with input_error_when_full(f"{what} {folder}", full), _lock(folder):
        folder.mkdir(exist_ok=True)
        write_json(folder / "key.json", key)
        yield folder


def find_prepared(kind: str, name: str, key: dict[str, Any], cache_dir: Path) -> dict[str, Any] | None:
    """Return the facts of a complete folder whose key contains these values; None if there is none."""
    folder = cache_dir / kind
    for found in sorted(folder.iterdir()) if folder.is_dir() else ():
        if found.name.startswith(f"{name}-") and is_prepared(found):
            facts = read_ledger(found)
            if key.items() <= facts["key"].items():
                return facts
    return None


def is_prepared(folder: Path) -> bool:
    """Whether the folder has a ledger and its files have the recorded sizes."""
    try:
        sizes = read_ledger(folder)["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, NotADirectoryError, KeyError, ValueError):
        return False


def read_ledger(folder: Path) -> dict[str, Any]:
    """Return the facts from `build`, with the folder's key under "key" and file sizes in bytes under "sizes"."""
    return json.loads((folder / LEDGER).read_text(encoding="utf-8"))


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lock a folder of the cache for this process; wait for another process that has it.

    Raises:
        InputError: the cache cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("waiting for another process that prepares %s", folder)
            lock.acquire()
    except (PermissionError, FileNotFoundError, NotADirectoryError, FileExistsError) as error:
        raise InputError(
            f"Cannot write prepared data to {folder.parent}: {error.strerror}.\n"
            "Choose another folder: cache_dir=FOLDER, or the environment variable GPT2LAB_CACHE"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
