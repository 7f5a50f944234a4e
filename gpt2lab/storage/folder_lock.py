"""FolderLock: exclusive lock on a folder, held by one process until it releases the lock or dies."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from gpt2lab.errors import InputError

NAME = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)
OWNER_WAIT = 1.0  # seconds within which a new owner has written its host and process id

log = logging.getLogger(__name__)


class InUseError(InputError):
    """Another process holds the lock on a folder."""


class FolderLock:
    """POSIX record lock on `<folder>/.lock`, a file with host, process id and use of the owner.

    The kernel releases the lock when the process dies, child processes do not inherit it, and it works on network file
    systems. If the file system does not support locks, a warning is logged and the folder is used without one. The
    lock stays valid when the folder is renamed.

    Args:
        folder: existing folder.
        use: what the owner does there, for the error message of other processes.
        keys: configuration keys that name the folder, for that message.

    Raises:
        InUseError: another process holds the lock; the message names its host and process id.
    """

    def __init__(self, folder: Path, use: str = "training", keys: str = "run_dir or name") -> None:
        self.folder = folder
        self._descriptor: int | None = None
        while self._descriptor is None:
            descriptor = _open_lock_file(folder / NAME, keys)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                held, owner = error.errno in HELD, _owner(descriptor)
                os.close(descriptor)
                if held:
                    raise InUseError(_in_use_message(folder, owner, keys)) from None
                log.warning("%s: this file system cannot lock (%s). Start no second run there.", folder, error.strerror)
                return
            if _is_at(descriptor, folder / NAME):  # the previous owner may have removed the file after the open
                self._descriptor = descriptor
            else:
                os.close(descriptor)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "use": use, "since": time.strftime("%F %T")}
        with suppress(OSError):  # a full disk: the lock is held nevertheless
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(owner).encode(), 0)

    def release(self) -> None:
        """Remove the lock file and release the lock."""
        if self._descriptor is None:
            return
        with suppress(OSError):  # the folder has become read-only: the file alone locks nothing
            if _is_at(self._descriptor, self.folder / NAME):
                (self.folder / NAME).unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_locked(folder: Path) -> bool:
    """Whether another process holds the lock on a folder; nothing is changed there."""
    try:
        descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in HELD
    finally:
        os.close(descriptor)
    return False


def _open_lock_file(path: Path, keys: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ELOOP):
            raise InputError(
                f"Cannot lock the folder {path.parent}: {path.name} cannot be opened for writing ({error.strerror}).\n"
                f"Make the folder writable, or give another {keys}."
            ) from None
        raise


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _owner(descriptor: int) -> dict[str, Any]:
    """Read host and process id from the lock file; empty if they cannot be read."""
    end = time.monotonic() + OWNER_WAIT
    while True:
        try:
            return dict(json.loads(os.pread(descriptor, 4096, 0)))
        except (ValueError, TypeError, OSError):
            if time.monotonic() > end:
                return {}
            time.sleep(0.01)


def _in_use_message(folder: Path, owner: dict[str, Any], keys: str) -> str:
    process = f"process {owner.get('pid', 'of unknown id')} on {owner.get('host', 'an unknown host')}"
    since = f" since {owner['since']}" if "since" in owner else ""
    return (
        f"{folder} is in use: {process} holds it for {owner.get('use', 'training')}{since}.\n"
        f"Wait until it ends, stop it there, or give another {keys}."
    )
