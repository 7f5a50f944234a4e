"""Checkpoints of a run (files or folders of shards) and the ledger with their sizes and checksums.

    <run>/checkpoints/step-000200.ckpt, index.json (the ledger), last and best (symlinks to checkpoints)

A checkpoint is valid once the ledger lists it with its size and SHA-256. The ledger is written after the file, so the
newest listed checkpoint is complete, whenever a process is killed. If the ledger is lost, a checkpoint is verified by
the checksums inside it; a folder of shards has them in checksums.json.
"""

import hashlib
import json
import re
import shlex
import shutil
import struct
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gpt2lab.storage.atomic_files import flush, point_symlink, write_json
from gpt2lab.storage.damaged_files import read_file, set_aside, warn_once

LEDGER = "index.json"
NAME = re.compile(r"step-(\d{6,})\.ckpt", re.ASCII)
SCRATCH_NAME = re.compile(r"\.step-\d{6,}\.ckpt\.tmp", re.ASCII)
CHECKSUMS = "checksums.json"  # in a folder of shards: file → SHA-256


@dataclass
class Entry:
    """One checkpoint: file name, completed optimizer steps, size in bytes, SHA-256."""

    file: str
    step: int
    bytes: int
    sha256: str


def checkpoint_folder(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def checkpoint_file(run_dir: str | Path, step: int) -> Path:
    """Return the path of the checkpoint of `step`."""
    return checkpoint_folder(run_dir) / f"step-{step:06d}.ckpt"


def scratch_file(run_dir: str | Path, step: int) -> Path:
    """Return the path to which the checkpoint of `step` is written before it is complete."""
    return checkpoint_folder(run_dir) / f".step-{step:06d}.ckpt.tmp"


def read_entries(run_dir: str | Path) -> list[Entry]:
    """Return the valid entries of the ledger, oldest first; empty without a readable ledger."""
    return _read_ledger(run_dir)[0]


def _read_ledger(run_dir: str | Path) -> tuple[list[Entry], bool]:
    """Return (valid entries, oldest first, one for each file; whether the ledger is undamaged or missing)."""
    path = checkpoint_folder(run_dir) / LEDGER
    try:
        content = json.loads(read_file(path))["checkpoints"]
        parsed = [_parse_entry(item) for item in content]
    except FileNotFoundError:
        return [], True
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return [], False
    valid = {entry.step: entry for entry in parsed if entry is not None}
    return sorted(valid.values(), key=lambda entry: entry.step), isinstance(content, list) and None not in parsed


def _parse_entry(item: Any) -> Entry | None:
    """Parse one entry of the ledger; None if a value has the wrong type or the file is not named like a checkpoint.

    A name with a path separator does not match, so a ledger cannot point outside the run directory.
    """
    try:
        entry = Entry(*(item[field.name] for field in fields(Entry)))
    except (KeyError, TypeError, IndexError):
        return None
    types = [type(value) for value in vars(entry).values()]
    if types != [str, int, int, str] or entry.bytes < 0:
        return None
    name = NAME.fullmatch(entry.file)
    return entry if name and int(name[1]) == entry.step else None


def commit_checkpoint(run_dir: str | Path, step: int, keep_last: int, best_step: int | None = None) -> Path:
    """Rename the scratch file of `step` to a checkpoint and list it; keep the newest `keep_last`, delete the rest.

    Args:
        best_step: step whose checkpoint is kept too, and which `best` then leads to.
    """
    folder = checkpoint_folder(run_dir)
    scratch = scratch_file(run_dir, step)
    if scratch.is_dir():
        write_json(scratch / CHECKSUMS, _checksums(scratch))
    for path in [*_files(scratch), scratch]:
        flush(path)
    path = checkpoint_file(run_dir, step)
    entry = _make_entry(scratch, path.name, step)
    # The run was resumed from a checkpoint before later ones, which are obsolete.
    listed = [*(old for old in read_entries(run_dir) if old.step < step and (folder / old.file).exists()), entry]
    best = next((one for one in listed if one.step == best_step), None)
    kept = [one for one in listed if one is best or one in listed[-keep_last:]]
    if path.is_dir() or scratch.is_dir():
        delete_checkpoint(path)  # rename cannot replace a folder that is not empty
    scratch.replace(path)
    flush(folder)
    write_json(folder / LEDGER, {"checkpoints": [asdict(entry) for entry in kept]})
    point_symlink(folder / "last", entry.file)
    if best is None:
        (folder / "best").unlink(missing_ok=True)
    else:
        point_symlink(folder / "best", best.file)
    named = {entry.file for entry in kept}
    scratch_files = [path for path in folder.glob(".step-*") if SCRATCH_NAME.fullmatch(path.name)]
    for stray in [*checkpoint_files(run_dir), *scratch_files]:
        if stray.name not in named:
            delete_checkpoint(stray)
    return path


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint, complete or partial; a missing one is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def newest_good_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest checkpoint whose bytes are those that were written; damaged ones are skipped with a warning.

    A checkpoint that the ledger does not list, or lists with other bytes, counts by the checksums inside it.
    """
    named, is_sound = _read_ledger(run_dir)
    folder, entries = checkpoint_folder(run_dir), {entry.file: entry for entry in named}
    files = {path.name: path for path in checkpoint_files(run_dir)} | {name: folder / name for name in entries}
    for path in sorted(files.values(), key=checkpoint_step, reverse=True):
        entry = entries.get(path.name)
        is_as_listed = entry is not None and _is_as_written(folder, entry)
        if is_as_listed or _has_valid_checksums(path):
            _warn_of_ledger(path, entry, is_as_listed, is_sound)
            return path
        if entry is not None:
            warn_once(f"Checkpoint {path} is damaged or missing; falling back to the one before.")
    if not is_sound:
        warn_once(f"{folder / LEDGER} is damaged, and its folder contains no intact checkpoint.")
    return None


def is_intact(run_dir: str | Path, path: Path) -> bool:
    """Whether a checkpoint of the run has the bytes that were written."""
    entry = next((one for one in read_entries(run_dir) if one.file == path.name), None)
    return (entry is not None and _is_as_written(path.parent, entry)) or _has_valid_checksums(path)


def _warn_of_ledger(path: Path, entry: Entry | None, is_as_listed: bool, is_sound: bool) -> None:
    """Warn where the ledger is wrong about the newest intact checkpoint."""
    by = "its ledger entry" if is_as_listed else "the checksums inside it"
    if not is_sound:
        kept = f"A resumed run keeps the damaged file as {LEDGER}.damaged."
        warn_once(f"{path.parent / LEDGER} is damaged; {path.name} is used, verified by {by}. {kept}")
    elif entry is None:
        warn_once(f"{LEDGER} does not list {path}; it is used, verified by {by}.")
    elif not is_as_listed:
        warn_once(f"{path} differs from its entry in {LEDGER}; it is used, verified by {by}.")


def checkpoint_files(run_dir: str | Path) -> list[Path]:
    """Return all files and folders named like a checkpoint, oldest first, listed in the ledger or not."""
    files = [path for path in checkpoint_folder(run_dir).glob("step-*.ckpt") if NAME.fullmatch(path.name)]
    return sorted(files, key=checkpoint_step)


def recovery_hint(run_dir: str | Path) -> str:
    """Return the lines of a full-disk error that name the intact checkpoint and the command to resume."""
    newest = newest_good_checkpoint(run_dir)
    if newest is None:
        return "The run has no checkpoint yet. Free some space and start it again."
    return f"{newest} is intact.\nFree some space and continue: python train.py resume={shlex.quote(str(run_dir))}"


def drop_checkpoints_after(run_dir: str | Path, step: int) -> None:
    """Remove the entries after `step`, from which a run is resumed: they are damaged or will be rewritten.

    A ledger that is damaged, missing or wrong about the checkpoint of `step` is rebuilt from the intact checkpoints.
    """
    named, is_sound = _read_ledger(run_dir)
    path = checkpoint_folder(run_dir) / LEDGER
    kept = [entry for entry in named if entry.step <= step]
    if kept and kept[-1].step == step and not _is_as_written(path.parent, kept[-1]):
        kept.pop()
    if not is_sound or step not in {entry.step for entry in kept}:
        names = {entry.file for entry in kept}
        files = [file for file in checkpoint_files(run_dir) if checkpoint_step(file) <= step and file.name not in names]
        kept += [_make_entry(file, file.name, checkpoint_step(file)) for file in files if _has_valid_checksums(file)]
        kept.sort(key=lambda entry: entry.step)
    if not is_sound:
        set_aside(path)
    if not is_sound or kept != named:
        write_json(path, {"checkpoints": [asdict(entry) for entry in kept]})


def _make_entry(path: Path, name: str, step: int) -> Entry:
    """Build the entry `name` for the checkpoint at `path`."""
    return Entry(name, step, _bytes(path), _sha256(path))


def _is_as_written(folder: Path, entry: Entry) -> bool:
    path = folder / entry.file
    try:
        return not _is_special(path) and _bytes(path) == entry.bytes and _sha256(path) == entry.sha256
    except OSError:
        return False


def _is_special(path: Path) -> bool:
    """Whether the path is neither a file nor a folder; reading a pipe would wait without end."""
    return not (path.is_file() or path.is_dir())


def _has_valid_checksums(path: Path) -> bool:
    """Verify a checkpoint without the ledger; torch.save writes zip archives with a checksum for each member."""
    try:
        if _is_special(path):
            return False
        if path.is_dir():
            return json.loads((path / CHECKSUMS).read_text()) == _checksums(path)
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, RuntimeError, EOFError, struct.error, zipfile.BadZipFile, zlib.error):
        return False


def checkpoint_step(checkpoint: Path) -> int:
    """Return the optimizer steps completed in a checkpoint, from its name."""
    return int(checkpoint.stem.rpartition("-")[2])


def _files(path: Path) -> list[Path]:
    """Return a checkpoint's files, sorted by name, without `checksums.json`."""
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in inside if file.name != CHECKSUMS]


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _checksums(folder: Path) -> dict[str, str]:
    return {file.name: _sha256(file) for file in _files(folder)}


def _sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file, or of a folder's checksums."""
    if path.is_dir():
        return hashlib.sha256(json.dumps(_checksums(path)).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
