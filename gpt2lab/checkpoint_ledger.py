"""The checkpoints of a run, each a file or a folder of shards, and the ledger that vouches for them.

    <run>/checkpoints/step-000200.ckpt, index.json (the ledger), last (a symlink to the newest checkpoint)

A checkpoint counts only once the ledger names it with its size and SHA-256; the ledger is written after the file.
So whatever instant a process dies at, the newest named checkpoint is whole. Where the ledger itself is lost, a
checkpoint still counts by the checksums inside it; a folder has them in a file.
"""

import hashlib
import json
import logging
import shutil
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from gpt2lab.atomic_files import flush, point_symlink, write_json

log = logging.getLogger(__name__)

LEDGER = "index.json"
CHECKSUMS = "checksums.json"  # of a folder of shards: file → SHA-256


@dataclass
class Entry:
    """One checkpoint: its name, the optimizer steps completed in it, and what its bytes must be."""

    file: str
    step: int
    bytes: int
    sha256: str


def checkpoint_folder(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def scratch_file(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is whole."""
    return checkpoint_folder(run_dir) / f".step-{step:06d}.ckpt.tmp"


def entries(run_dir: str | Path) -> list[Entry]:
    """What the ledger names, oldest first; empty without a readable ledger."""
    path = checkpoint_folder(run_dir) / LEDGER
    try:
        return [Entry(**entry) for entry in json.loads(path.read_text())["checkpoints"]]
    except FileNotFoundError:
        return []
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        log.warning("%s is damaged and was ignored.", path)
        return []


def record(run_dir: str | Path, step: int, keep_last: int) -> Path:
    """Turn the scratch file of `step` into a checkpoint; keep the newest `keep_last` and delete every other file."""
    folder = checkpoint_folder(run_dir)
    scratch = scratch_file(run_dir, step)
    if scratch.is_dir():
        write_json(scratch / CHECKSUMS, _checksums(scratch))
    for path in [*_files(scratch), scratch]:
        flush(path)
    entry = Entry(f"step-{step:06d}.ckpt", step, _bytes(scratch), _sha256(scratch))
    # Checkpoints beyond this step come from a run that was taken up again before them.
    kept = [*(old for old in entries(run_dir) if old.step < step), entry][-keep_last:]
    path = folder / entry.file
    if path.is_dir() or scratch.is_dir():
        discard(path)  # a folder takes no other's place
    scratch.replace(path)
    flush(folder)
    write_json(folder / LEDGER, {"checkpoints": [asdict(entry) for entry in kept]})
    point_symlink(folder / "last", entry.file)
    named = {entry.file for entry in kept}
    for stray in [*folder.glob("step-*.ckpt"), *folder.glob(".step-*.tmp")]:
        if stray.name not in named:
            discard(stray)
    return path


def discard(path: Path) -> None:
    """Delete a checkpoint or what there is of one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def newest_good_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest checkpoint whose bytes are those that were written; damaged ones are passed over with a warning."""
    for entry in reversed(entries(run_dir)):
        path = checkpoint_folder(run_dir) / entry.file
        if path.exists() and _bytes(path) == entry.bytes and _sha256(path) == entry.sha256:
            return path
        log.warning("Checkpoint %s is damaged or missing; falling back to the one before.", path)
    named = {entry.file for entry in entries(run_dir)}
    for path in reversed(checkpoint_files(run_dir)):
        if path.name not in named and _is_whole(path):
            log.warning("The ledger does not name %s, but it is whole by its own checksums.", path)
            return path
    return None


def checkpoint_files(run_dir: str | Path) -> list[Path]:
    """Everything that was put in place as a checkpoint, whether the ledger names it or not."""
    return sorted(checkpoint_folder(run_dir).glob("step-*.ckpt"))


def drop_after(run_dir: str | Path, step: int) -> None:
    """Strike from the ledger what lies beyond `step`, from which a run goes on: damaged, or soon written anew."""
    named = entries(run_dir)
    kept = [entry for entry in named if entry.step <= step]
    if len(kept) < len(named):
        write_json(checkpoint_folder(run_dir) / LEDGER, {"checkpoints": [asdict(entry) for entry in kept]})


def _is_whole(path: Path) -> bool:
    """PyTorch writes zip archives with a checksum for each member."""
    try:
        if path.is_dir():
            return json.loads((path / CHECKSUMS).read_text()) == _checksums(path)
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def step_of(checkpoint: Path) -> int:
    """The optimizer steps completed in a checkpoint, from its name."""
    return int(checkpoint.stem.rpartition("-")[2])


def _files(path: Path) -> list[Path]:
    """A checkpoint's files, in the order of their names; `checksums.json` is about the others and not one of them."""
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in inside if file.name != CHECKSUMS]


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _checksums(folder: Path) -> dict[str, str]:
    return {file.name: _sha256(file) for file in _files(folder)}


def _sha256(path: Path) -> str:
    """Of a file; of a folder that of its checksums."""
    if path.is_dir():
        return hashlib.sha256(json.dumps(_checksums(path)).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
