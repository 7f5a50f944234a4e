"""Content-addressed cache of prepared data: made once under a lock, never used half made."""

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
from gpt2lab.storage.atomic_files import replaced_folder, told_when_full, write_json

log = logging.getLogger(__name__)

LEDGER = "ledger.json"


def cache_folder(configured: str | None = None) -> Path:
    """The folder given, else $GPT2LAB_CACHE, else ~/.cache/gpt2lab."""
    return Path(configured or os.environ.get("GPT2LAB_CACHE") or "~/.cache/gpt2lab").expanduser()


def content_hash(content: Any) -> str:
    """SHA-256 (hex) of anything JSON can hold; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def prepared(
    kind: str, name: str, key: dict[str, Any], build: Callable[[Path], dict[str, Any]], cache_dir: Path
) -> Path:
    """The folder `<cache_dir>/<kind>/<name>-<hash of key>`, made by `build` if it is not there yet.

    `build(scratch)` fills a scratch folder and returns facts for the ledger. The ledger, which also holds the size of
    every file, is written last and the scratch folder then renamed: a build that was killed leaves nothing that could
    be taken for finished, and a folder whose files were cut short later is made anew. Processes that want the same
    folder wait for the one that makes it.

    Raises:
        InputError: the cache cannot be written, no space is left, or whatever `build` raises.
    """
    folder = cache_dir / kind / f"{name}-{content_hash(key)[:12]}"
    if is_prepared(folder):
        return folder
    full = "What was begun is removed. Free some space, or put the cache elsewhere: cache_dir=FOLDER"
    with told_when_full(f"prepared data to {folder}", full), locked(folder):
        if not is_prepared(folder):
            with replaced_folder(folder) as scratch:
                facts = build(scratch)
                sizes = {str(file.relative_to(scratch)): file.stat().st_size for file in _files_in(scratch)}
                write_json(scratch / LEDGER, {**facts, "key": key, "sizes": sizes})
    return folder


@contextmanager
def grown(kind: str, name: str, key: dict[str, Any], what: str, cache_dir: Path) -> Iterator[Path]:
    """The folder `<cache_dir>/<kind>/<name>-<hash of key>`, which whoever needs more of it adds to, one at a time.

    Unlike `prepared` it is never whole: its files say themselves what is there. key.json holds what it was made from.

    Args:
        what: is written there, for messages.

    Raises:
        InputError: the cache cannot be written, or no space is left.
    """
    folder = cache_dir / kind / f"{name}-{content_hash(key)[:12]}"
    full = "What was written is kept. Free some space and start again, or put the cache elsewhere: cache_dir=FOLDER"
    with told_when_full(f"{what} {folder}", full), locked(folder):
        folder.mkdir(exist_ok=True)
        write_json(folder / "key.json", key)
        yield folder


def is_prepared(folder: Path) -> bool:
    """Whether a build finished here and its files still have their sizes."""
    try:
        sizes = read_ledger(folder)["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, NotADirectoryError, KeyError, ValueError):
        return False


def read_ledger(folder: Path) -> dict[str, Any]:
    """What `build` returned; under "key" what the folder was made from, under "sizes" the size of each file."""
    return json.loads((folder / LEDGER).read_text(encoding="utf-8"))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from working on this folder of the cache; waits for the one that does.

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
