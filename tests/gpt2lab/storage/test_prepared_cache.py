"""Cache on unusual file systems: without locks it works, and one that cannot be written is an error with a fix."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.errors import InputError
from gpt2lab.storage.atomic_files import can_write
from gpt2lab.storage.prepared_cache import get_or_build, is_prepared, open_growing_folder

CODES = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO, errno.ESTALE)


def build(folder: Path) -> dict[str, Any]:
    (folder / "tokens.bin").write_bytes(b"12")
    return {"tokens": 2}


def prepare(cache: Path) -> Path:
    return get_or_build("tokens", "text", {"seed": 1}, build, cache)


@pytest.mark.parametrize("code", CODES, ids=lambda code: errno.errorcode[code])
def test_a_cache_without_locks_is_used(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """This stands for a file system that cannot be mounted here: NFS without a lock service, some FUSE file systems."""

    def fail(*_unused: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    assert is_prepared(prepare(tmp_path))
    with open_growing_folder("teachers", "text", {}, "the teacher's cache", tmp_path) as folder:
        assert (folder / "key.json").is_file()
    assert f"cannot lock ({os.strerror(code)})" in caplog.text
    assert not list(tmp_path.rglob("*tmp")), "the scratch folder has become the prepared one"


LEDGERS = ("", "[]", "null", "7", "[" * 100_000, "\udcff")
LEDGERS += ('{"sizes": null}', '{"sizes": []}', '{"sizes": {}, "key": null}')


@pytest.mark.parametrize("ledger", LEDGERS, ids=lambda text: text[:20])
def test_a_folder_with_a_damaged_ledger_is_prepared_again(ledger: str, tmp_path: Path):
    folder = prepare(tmp_path)
    (folder / "ledger.json").write_bytes(os.fsencode(ledger))
    assert not is_prepared(folder)
    assert is_prepared(prepare(tmp_path))


@pytest.mark.parametrize("cache", ["/proc/none", "/proc/none/below", "/dev/null", "/dev/null/none", "/sys/none"])
def test_a_cache_that_cannot_be_written_is_refused(cache: str):
    with pytest.raises(InputError, match=f"Cannot write prepared data to {cache}/tokens: .*\n.*cache_dir=FOLDER"):
        prepare(Path(cache))
    with (
        pytest.raises(InputError, match=f"Cannot write prepared data to {cache}/teachers: "),
        open_growing_folder("teachers", "text", {}, "the teacher's cache", Path(cache)),
    ):
        pass


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A cache with prepared data on a read-only file system."""
    folder = tmp_path / "cache"
    prepare(folder)
    with open_growing_folder("teachers", "text", {}, "the teacher's cache", folder) as teachers:
        (teachers / "train.bin").write_bytes(b"12")
    folder.chmod(0o555)
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    is_mounted = can_write(folder) and not os.system(f"mount --bind {folder} {folder} 2>&-")
    if is_mounted:
        os.system(f"mount -o remount,bind,ro {folder}")
    if can_write(folder):
        pytest.skip("a read-only file system takes root")
    yield folder
    if is_mounted:
        os.system(f"umount -l {folder}")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_cache_is_read_and_never_written(read_only: Path):
    assert is_prepared(prepare(read_only))
    with open_growing_folder("teachers", "text", {}, "the teacher's cache", read_only) as folder:
        assert (folder / "train.bin").read_bytes() == b"12"
    with pytest.raises(InputError, match="Cannot write prepared data"):
        get_or_build("tokens", "text", {"seed": 2}, build, read_only)
    with (
        pytest.raises(InputError, match="Cannot write prepared data"),
        open_growing_folder("teachers", "text", {}, "the teacher's cache", read_only) as folder,
        (folder / "train.bin").open("r+b"),
    ):
        pass
    with (
        pytest.raises(InputError, match="Cannot write prepared data"),
        open_growing_folder("teachers", "text", {"k": 2}, "the teacher's cache", read_only),
    ):
        pass
