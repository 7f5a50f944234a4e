"""Content-addressed cache of prepared data: made once under a lock, never used half made."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpt2lab.atomic_files import replaced_folder, told_when_full, write_json

log = logging.getLogger(__name__)

LEDGER = "ledger.json"


def cache_folder(configured: str = "") -> Path:
    """The folder given, else $GPT2LAB_CACHE, else ~/.cache/gpt2lab."""
    return Path(configured or os.environ.get("GPT2LAB_CACHE") or "~/.cache/gpt2lab").expanduser()


def content_hash(content: Any) -> str:
    """SHA-256 (hex) of anything JSON can hold; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def prepared(
    kind: str, name: str, key: dict[str, Any], build: Callable[[Path], dict[str, Any]], cache_dir: Path
) -> Path:
    """The folder `<cache_dir>/<kind>/<name>-<hash of key>`, made by `build` if it is not there yet.

    `build(scratch)` fills a scratch folder and returns facts for the ledger. The ledger is written last and the scratch
    folder then renamed, so a build that was killed leaves nothing that could be taken for finished. Processes that want
    the same folder wait for the one that makes it.

    Raises:
        InputError: no space left, or whatever `build` raises.
    """
    folder = cache_dir / kind / f"{name}-{content_hash(key)[:12]}"
    if is_prepared(folder):
        return folder
    with told_when_full(str(folder), "Free some space, or put the cache elsewhere with cache_dir=FOLDER."):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another process that prepares %s", folder)
            lock.acquire()
        with lock:
            if not is_prepared(folder):
                with replaced_folder(folder) as scratch:
                    write_json(scratch / LEDGER, {**build(scratch), "key": key})
        lock.release()
    return folder


def is_prepared(folder: Path) -> bool:
    """Whether a build finished here."""
    return (folder / LEDGER).is_file()


def read_ledger(folder: Path) -> dict[str, Any]:
    """What `build` returned, and under "key" what the folder was made from."""
    return json.loads((folder / LEDGER).read_text(encoding="utf-8"))
