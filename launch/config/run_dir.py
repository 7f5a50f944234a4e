"""Run directories: naming, atomic creation, locking and deletion, and the search for finished runs."""

import errno
import itertools
import json
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt2lab.errors import InputError
from gpt2lab.reports import side_files
from gpt2lab.storage import folder_lock
from gpt2lab.storage.atomic_files import can_write, delete_scratch_files, flush
from gpt2lab.storage.checkpoint_ledger import checkpoint_step, newest_good_checkpoint
from gpt2lab.storage.damaged_files import read_file
from gpt2lab.storage.folder_lock import FolderLock, InUseError
from gpt2lab.storage.metrics_csv import read_metrics
from gpt2lab.storage.model_folder import read_shape
from gpt2lab.storage.report_json import is_finished
from launch.config import run_spec
from launch.config.run_spec import PreparedSpec
from launch.config.schema import RunConfig

RUNS, STUDIES = Path("runs"), Path("studies")
CONFIG = "config.yaml"
HYDRA = ".hydra"
SIDE_FILES: tuple[str, ...] = ("metrics.csv", "samples.jsonl", "report.json", "report.html")
SIDE_FILES += ("val_documents.json", "val_examples.json")
LOGGER_FOLDERS = ("wandb", "tensorboard", "lightning")  # lightning: of a ModelCheckpoint
OWN_FILES = (folder_lock.NAME, CONFIG, HYDRA, *SIDE_FILES, "checkpoints", "hf", "logs", "inspect", *LOGGER_FOLDERS)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, with its configuration and the shape of its exported weights."""

    folder: Path
    spec: PreparedSpec
    shape: dict[str, int]


def check_name(config: RunConfig) -> None:
    """Check that `name` or `run_dir` is a valid name for a run.

    Raises:
        InputError: both are given, the name is empty, or it contains `=`, spaces or, for `name`, a slash.
    """
    if config.name is not None and config.run_dir is not None:
        raise InputError("name and run_dir both set the run directory; give one of them.")
    last = Path(config.run_dir).name if config.run_dir else config.name
    if last is not None and (not last or "=" in last or any(letter.isspace() for letter in last)):
        raise InputError(f"{last!r} is not a valid run name: give a name without = and without spaces.")
    if config.name is not None and ("/" in config.name or config.name in (".", "..")):
        raise InputError(f"name={config.name} is a path; set run_dir={config.name} instead.")


def run_folder(config: RunConfig) -> Path:
    """Return run_dir, or runs/<task>/<name or model-time>; for a study studies/<name or time>."""
    if config.run_dir:
        return Path(config.run_dir).expanduser()
    now, model = time.strftime("%Y-%m-%d_%H-%M-%S"), config.groups["model"]
    if config.is_study:
        return STUDIES / (config.name or now)
    return RUNS / config.task_name / (config.name or f"{model}-{now}")


def check_free(folder: Path) -> None:
    """Check that the folder is empty or can be created.

    Raises:
        InputError: it is not.
    """
    if folder.is_dir() and not _is_free(folder):
        raise InputError(
            f"{folder} is not empty.\nResume the run in it with resume={shlex.quote(str(folder))}, "
            "or give another run_dir or name."
        )
    check_creatable(folder, "run_dir")


def check_creatable(folder: Path, key: str) -> None:
    """Check that the folder exists or can be created.

    Args:
        key: configuration key of the folder, for the message.

    Raises:
        InputError: it does not and cannot.
    """
    existing = folder
    try:
        folder.resolve()
    except RuntimeError as error:  # a loop of symbolic links
        raise InputError(f"Cannot create the folder {folder}: {error}.\nGive another {key}.") from None
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not can_write(existing):
        raise InputError(f"Cannot create the folder {folder}: {existing} cannot be written to.\nGive another {key}.")


def check_run_folder(config: RunConfig) -> None:
    """Check the folder of a new run; a default name gets a number if the folder exists, so it need not be free.

    Raises:
        InputError: the folder cannot be created, or a given folder is not empty.
    """
    if config.run_dir or config.name:
        check_free(run_folder(config))
    else:
        check_creatable(run_folder(config), "run_dir")


def reserve(config: RunConfig) -> tuple[Path, list[Path]]:
    """Create an empty folder for a run that another process starts; a default name is made unique.

    Returns:
        The folder, and all folders that were created for it, innermost first.

    Raises:
        InputError: as `check_run_folder`.
    """
    check_run_folder(config)
    is_named, base = bool(config.run_dir or config.name), run_folder(config)
    for folder in _numbered(base):
        created = missing_folders(folder)
        try:
            folder.mkdir(parents=True, exist_ok=is_named)
        except FileExistsError:
            continue
        return folder, created
    raise AssertionError("unreachable: there are infinitely many numbers")


def missing_folders(folder: Path) -> list[Path]:
    """Return the folder and its parents that do not exist, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(created: list[Path]) -> None:
    """Delete empty folders; they must be sorted innermost first."""
    for path in created:
        try:
            path.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return


class RunDirectory:
    """The directory of one run and its lock.

    A new directory is created under a temporary name, filled with config.yaml and renamed, so a killed process leaves
    no incomplete run. The process that launches the run locks the directory until it ends; its ranks only receive the
    path.

    Args:
        given: the directory, in a rank of a run that another process has launched.
    """

    def __init__(self, given: Path | None = None) -> None:
        self.path = given
        self._is_ready = given is not None
        self._lock: FolderLock | None = None
        self._created: list[Path] = []  # folders that this process created, innermost first
        self._was_free = False

    def open(self, folder: Path) -> None:
        """Lock an existing directory.

        Raises:
            InputError: another process uses it, or a link in it leads to files of another directory.
        """
        _check_links(folder)
        self._lock, self.path = _lock(folder), folder

    def newest_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint of the run; None if it starts at step 0."""
        return None if self.path is None else newest_good_checkpoint(self.path)

    def enter(self, spec: PreparedSpec, is_resumed: bool = False) -> Path:
        """Create the directory if necessary, write config.yaml and return the directory.

        Raises:
            InputError: the directory of a new run is not empty, or another process uses it.
        """
        if self._is_ready:
            assert self.path is not None
            return self.path
        if is_resumed:
            assert self.path is not None
            run_spec.save(spec, self.path / CONFIG)
        elif self.path is not None:
            self.restart(spec)
        else:
            self._create(spec)
            assert self.path is not None
            run_spec.save_for_hydra(spec.config, self.path / HYDRA)
        self._is_ready = True
        return self.path

    def restart(self, spec: PreparedSpec) -> None:
        """Restart a run that has no checkpoint: delete its metrics and samples."""
        assert self.path is not None
        side_files.repair(self.path)
        run_spec.save(spec, self.path / CONFIG)
        run_spec.save_for_hydra(spec.config, self.path / HYDRA)
        for name in SIDE_FILES:
            (self.path / name).unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete a new run without a step, if this process started it and the directory contains only files of a run.

        A directory that existed before, empty, remains.
        """
        if self.path is None or not self._was_free:
            return
        entries = list(self.path.iterdir())
        if not all(entry.name in OWN_FILES or _is_scratch(entry.name) for entry in entries):
            return
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != folder_lock.NAME:
                entry.unlink(missing_ok=True)
        self.close()
        remove_empty(self._created)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _create(self, spec: PreparedSpec) -> None:
        config = spec.config
        check_run_folder(config)
        is_named, base = bool(config.run_dir or config.name), run_folder(config)
        for folder in itertools.repeat(base) if is_named else _numbered(base):
            try:
                if self._start(folder, spec):
                    return
            except InUseError:
                if is_named:
                    raise
            if is_named:
                check_free(folder)  # raises if another process has created it since

    def _start(self, folder: Path, spec: PreparedSpec) -> bool:
        """Fill a temporary directory and rename it to `folder`; return False if `folder` is not free any more."""
        target = folder.resolve()
        if not _is_free(target):
            return False
        created, temporary = missing_folders(target), target.with_name(f".{target.name}.start")
        if target.is_dir() and (target.is_mount() or any(target.iterdir()) or not can_write(target.parent)):
            temporary = target  # cannot be replaced by a rename
        elif not _is_free(temporary, CONFIG):
            raise InputError(
                f"{temporary} is needed to start the run and contains other files.\nMove it, or give another name."
            )
        temporary.mkdir(parents=True, exist_ok=True)
        try:
            lock = _lock(temporary)
        except FileNotFoundError:  # another process has renamed or removed it
            return False
        run_spec.save(spec, temporary / CONFIG)
        if temporary != target:
            try:
                temporary.rename(target)  # an empty directory may exist there
            except OSError as error:
                (temporary / CONFIG).unlink()
                lock.release()
                remove_empty([temporary])
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return False
                raise
            flush(target.parent)
        lock.folder = target
        self.path, self._lock, self._created, self._was_free = folder, lock, created, True
        return True


def _numbered(base: Path) -> Iterator[Path]:
    yield base
    for number in itertools.count(2):
        yield base.with_name(f"{base.name}-{number}")


def _lock(folder: Path) -> FolderLock:
    """Lock a run directory and delete temporary files of a killed process."""
    lock = FolderLock(folder)
    for entry in folder.iterdir():
        if _is_scratch(entry.name) and entry.is_file():
            entry.unlink(missing_ok=True)
        elif entry.name in OWN_FILES and entry.is_dir() and not entry.is_symlink():
            delete_scratch_files(entry)
    return lock


def _check_links(folder: Path) -> None:
    """Refuse a directory whose files to rewrite and delete are links to files elsewhere, such as another run's.

    Loggers only add files to their folders, which may be on another disk.
    """
    for path in (folder / name for name in OWN_FILES if name not in LOGGER_FOLDERS):
        if not path.is_symlink() or path.resolve().is_relative_to(folder.resolve()):
            continue
        if path.exists():
            raise InputError(
                f"{path} is a link to {path.resolve()}, where a resumed run would overwrite and delete files.\n"
                "Replace the link with a copy of what it leads to, or link the whole run directory."
            )
        if path.name == "checkpoints":
            raise InputError(
                f"{path} is a link to {path.resolve()}, which does not exist.\n"
                "Mount its disk, or replace the link with the folder of checkpoints."
            )


def _is_scratch(name: str) -> bool:
    """Whether this is the name of a temporary file for a file of a run."""
    return name.endswith(".tmp") and any(name.startswith(f".{own}.") for own in OWN_FILES)


def _is_free(folder: Path, *allowed: str) -> bool:
    """Whether the folder does not exist, or contains only `allowed` names and the lock and temporary files of a run."""
    if not folder.exists():
        return True
    names = (folder_lock.NAME, *allowed)
    return folder.is_dir() and all(entry.name in names or _is_scratch(entry.name) for entry in folder.iterdir())


def finished_runs(root: Path = RUNS) -> list[FinishedRun]:
    """Return the finished runs with exported weights under `root`, newest first; unreadable folders are skipped."""
    runs = []
    for file in sorted(root.glob("**/report.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        folder = file.parent
        try:
            report = json.loads(read_file(file))
            if isinstance(report, dict) and is_finished(report):
                runs.append(FinishedRun(folder, run_spec.load(folder / CONFIG), read_shape(folder / "hf")))
        except (OSError, ValueError, RecursionError):
            continue
    return runs


def kept_checkpoint_message(folder: Path, planned: int, reached: int | None = None) -> str:
    """Return a message with the newest checkpoint of an interrupted run, the lost steps and the resume command.

    Args:
        planned: steps of the whole run.
        reached: step after which the run ended; None: unknown, at least the last one in metrics.csv.
    """
    newest, rows = newest_good_checkpoint(folder), read_metrics(folder)
    last = max(reached or 0, int(rows[-1]["step"]) if rows else 0)
    if newest is None:
        return f"No checkpoint was saved in {folder}; {f'{last} steps are lost' if last else 'no step was logged'}."
    step = checkpoint_step(newest)
    if last > step:
        lost = f"steps {step + 1} to {last}{' or later' if reached is None else ''} are lost"
    else:
        lost = "steps after it are lost" if reached is None and step < planned else "no step is lost"
    return (
        f"The newest checkpoint is of step {step}; {lost}. "
        f"Continue with: python train.py resume={shlex.quote(str(folder))}"
    )
