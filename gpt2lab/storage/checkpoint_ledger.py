"""The checkpoints of a run, each a file or a folder of shards, and the ledger that vouches for them.

    <run>/checkpoints/step-000200.ckpt, index.json (the ledger), last (a symlink to the newest checkpoint)

A checkpoint counts only once the ledger names it with its size and SHA-256; the ledger is written after the file.
So whatever instant a process dies at, the newest named checkpoint is whole. Where the ledger itself is lost, a
checkpoint still counts by the checksums inside it; a folder has them in a file.
"""

import hashlib
import json
import os
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
from gpt2lab.storage.damaged_files import set_aside, warn_once

LEDGER = "index.json"
NAME = re.compile(r"step-(\d{6,})\.ckpt", re.ASCII)
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


def checkpoint_file(run_dir: str | Path, step: int) -> Path:
    """Path of the checkpoint of `step`."""
    return checkpoint_folder(run_dir) / f"step-{step:06d}.ckpt"


def scratch_file(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is whole."""
    return checkpoint_folder(run_dir) / f".step-{step:06d}.ckpt.tmp"


def entries(run_dir: str | Path) -> list[Entry]:
    """The valid entries of the ledger, oldest first; empty without a readable ledger."""
    return _read_ledger(run_dir)[0]


def _read_ledger(run_dir: str | Path) -> tuple[list[Entry], bool]:
    """(the ledger's valid entries, oldest first; whether it is undamaged or missing)."""
    path = checkpoint_folder(run_dir) / LEDGER
    try:
        content = json.loads(path.read_text(encoding="utf-8"))["checkpoints"]
        parsed = [_entry(item) for item in content]
    except FileNotFoundError:
        return [], not os.path.lexists(path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return [], False
    valid = [entry for entry in parsed if entry is not None]
    return valid, isinstance(content, list) and len(valid) == len(parsed)


def _entry(item: Any) -> Entry | None:
    """One entry of the ledger; None where a value has the wrong type or the name is not that of a checkpoint.

    A name is no path, so a ledger cannot lead out of the run directory.
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


def record(run_dir: str | Path, step: int, keep_last: int) -> Path:
    """Turn the scratch file of `step` into a checkpoint; keep the newest `keep_last` and delete every other file."""
    folder = checkpoint_folder(run_dir)
    scratch = scratch_file(run_dir, step)
    if scratch.is_dir():
        write_json(scratch / CHECKSUMS, _checksums(scratch))
    for path in [*_files(scratch), scratch]:
        flush(path)
    path = checkpoint_file(run_dir, step)
    entry = _entry_of(scratch, path.name, step)
    # Checkpoints beyond this step come from a run that was taken up again before them.
    kept = [*(old for old in entries(run_dir) if old.step < step), entry][-keep_last:]
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
    """The newest checkpoint whose bytes are those that were written; damaged ones are skipped with a warning.

    Where the ledger is damaged, checkpoints that it does not name count as well, by their own checksums.
    """
    named, is_sound = _read_ledger(run_dir)
    folder = checkpoint_folder(run_dir)
    if not is_sound:
        return _newest_despite_ledger(folder, named)
    for entry in reversed(named):
        if _is_as_written(folder, entry):
            return folder / entry.file
        warn_once(f"Checkpoint {folder / entry.file} is damaged or missing; falling back to the one before.")
    for path in reversed(checkpoint_files(run_dir)):
        if path.name not in {entry.file for entry in named} and _is_whole(path):
            warn_once(f"The ledger does not name {path}, but it is whole by its own checksums.")
            return path
    return None


def _newest_despite_ledger(folder: Path, named: list[Entry]) -> Path | None:
    by_name = {entry.file: entry for entry in named}
    for path in reversed(checkpoint_files(folder.parent)):
        entry = by_name.get(path.name)
        if _is_as_written(folder, entry) if entry else _is_whole(path):
            by = "as the ledger names it" if entry else "whole by its own checksums"
            kept = f"A run that continues keeps the damaged file as {LEDGER}.damaged."
            warn_once(f"{folder / LEDGER} is damaged; {path.name} is used, which is {by}. {kept}")
            return path
    warn_once(f"{folder / LEDGER} is damaged, and there is no whole checkpoint beside it.")
    return None


def checkpoint_files(run_dir: str | Path) -> list[Path]:
    """Everything that was put in place as a checkpoint, oldest first, whether the ledger names it or not."""
    files = [path for path in checkpoint_folder(run_dir).glob("step-*.ckpt") if NAME.fullmatch(path.name)]
    return sorted(files, key=step_of)


def what_is_kept(run_dir: str | Path) -> str:
    """What a user can do after a run could not write: the lines of a message that name the intact checkpoint."""
    newest = newest_good_checkpoint(run_dir)
    if newest is None:
        return "The run has no checkpoint yet. Free some space and start it again."
    return f"{newest} is intact.\nFree some space and continue: python train.py resume={shlex.quote(str(run_dir))}"


def drop_after(run_dir: str | Path, step: int) -> None:
    """Remove from the ledger what lies beyond `step`, from which a run continues: damaged, or soon written anew.

    A damaged or missing ledger is written anew with the checkpoints that are whole.
    """
    named, is_sound = _read_ledger(run_dir)
    path = checkpoint_folder(run_dir) / LEDGER
    kept = [entry for entry in named if entry.step <= step]
    if not is_sound or not path.exists():
        names = {entry.file for entry in kept}
        files = [file for file in checkpoint_files(run_dir) if step_of(file) <= step and file.name not in names]
        kept += [_entry_of(file, file.name, step_of(file)) for file in files if _is_whole(file)]
        kept.sort(key=lambda entry: entry.step)
    if not is_sound:
        set_aside(path)
    if not is_sound or kept != named:
        write_json(path, {"checkpoints": [asdict(entry) for entry in kept]})


def _entry_of(path: Path, name: str, step: int) -> Entry:
    """The entry of a checkpoint that lies at `path` and is called `name`."""
    return Entry(name, step, _bytes(path), _sha256(path))


def _is_as_written(folder: Path, entry: Entry) -> bool:
    path = folder / entry.file
    try:
        return path.exists() and _bytes(path) == entry.bytes and _sha256(path) == entry.sha256
    except OSError:
        return False


def _is_whole(path: Path) -> bool:
    """PyTorch writes zip archives with a checksum for each member."""
    try:
        if path.is_dir():
            return json.loads((path / CHECKSUMS).read_text()) == _checksums(path)
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, RuntimeError, EOFError, struct.error, zipfile.BadZipFile, zlib.error):
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
