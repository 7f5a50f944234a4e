"""Run folders: where a run lies, how it is made, and how earlier runs are found by report.json and config.yaml."""

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
from gpt2lab.storage.atomic_files import can_write, flush
from gpt2lab.storage.checkpoint_ledger import newest_good_checkpoint, step_of
from gpt2lab.storage.folder_lock import FolderLock, InUseError
from gpt2lab.storage.metrics_csv import read_metrics
from gpt2lab.storage.model_folder import read_shape
from launch.config import run_spec
from launch.config.run_spec import PreparedSpec
from launch.config.schema import RunConfig

RUNS, STUDIES = Path("runs"), Path("studies")
CONFIG = "config.yaml"
HYDRA = ".hydra"
SIDE_FILES = ("metrics.csv", "samples.jsonl", "report.json", "report.html", "val_documents.json")
OWN_FILES = (
    folder_lock.NAME,
    CONFIG,
    HYDRA,
    *SIDE_FILES,
    "checkpoints",
    "hf",
    "logs",
    "wandb",
    "tensorboard",
    "inspect",
)


@dataclass(frozen=True)
class FinishedRun:
    """An earlier run that has a report, a configuration and exported weights of a known shape."""

    folder: Path
    spec: PreparedSpec
    shape: dict[str, int]


def check_name(config: RunConfig) -> None:
    """Refuse what would make paths awkward to type or that names nothing.

    Raises:
        InputError
    """
    if config.name is not None and config.run_dir is not None:
        raise InputError("name and run_dir both say where the run lies; give one of them.")
    last = Path(config.run_dir).name if config.run_dir else config.name
    if last is not None and (not last or "=" in last or any(letter.isspace() for letter in last)):
        raise InputError(f"A run cannot be called {last!r}: give a name without = and without spaces.")
    if config.name is not None and ("/" in config.name or config.name in (".", "..")):
        raise InputError(f"name={config.name} is a path; set run_dir={config.name} instead.")


def wanted_folder(config: RunConfig) -> Path:
    """run_dir, else runs/<task>/<name>, else runs/<task>/<model>-<time>; of a study studies/<name>, studies/<time>."""
    if config.run_dir:
        return Path(config.run_dir).expanduser()
    now, model = time.strftime("%Y-%m-%d_%H-%M-%S"), config.groups["model"]
    if config.is_study:
        return STUDIES / (config.name or now)
    return RUNS / config.task_name / (config.name or f"{model}-{now}")


def check_free(folder: Path) -> None:
    """The folder can be made here and holds nothing yet.

    Raises:
        InputError
    """
    if folder.is_dir() and not _is_free(folder):
        raise InputError(
            f"{folder} is not empty.\nContinue the run in it with resume={folder}, or give another run_dir or name."
        )
    check_can_be_made(folder, "run_dir")


def check_can_be_made(folder: Path, key: str) -> None:
    """Whether the folder that `key` names is there or can be made.

    Raises:
        InputError
    """
    existing = folder
    try:
        folder.resolve()
    except RuntimeError as error:  # a loop of links
        raise InputError(f"Cannot make the folder {folder}: {error}.\nGive another {key}.") from None
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not can_write(existing):
        raise InputError(f"Cannot make the folder {folder}: {existing} cannot be written to.\nGive another {key}.")


def check_free_folder(config: RunConfig) -> None:
    """A named folder is free; one named by the time can be made, and gets a number where another run took that name.

    Raises:
        InputError
    """
    if config.run_dir or config.name:
        check_free(wanted_folder(config))
    else:
        check_can_be_made(wanted_folder(config), "run_dir")


def reserve(config: RunConfig) -> tuple[Path, list[Path]]:
    """Create the run's folder, empty, for a process elsewhere; without a name of its own its name is made unique.

    Returns:
        The folder, and the folders that were created for it, the innermost first.
    """
    check_free_folder(config)
    is_named, base = bool(config.run_dir or config.name), wanted_folder(config)
    for folder in _numbered(base):
        made = missing(folder)
        try:
            folder.mkdir(parents=True, exist_ok=is_named)
        except FileExistsError:
            continue
        return folder, made
    raise AssertionError("unreachable: there are infinitely many numbers")


def missing(folder: Path) -> list[Path]:
    """The folder and those above it that do not exist, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(made: list[Path]) -> None:
    """Delete the folders that this process created, the innermost first, as far as they are empty."""
    for path in made:
        try:
            path.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return


class RunDirectory:
    """The directory of one run, and this process's claim on it.

    A new directory appears under its name with config.yaml inside: it is filled beside its place and then renamed, so a
    process that is killed meanwhile leaves no half-made run. The process that launches the run locks the directory
    until it ends; its ranks receive the path alone.

    Args:
        given: the directory, where another process has launched the run and looks after it.
    """

    def __init__(self, given: Path | None = None) -> None:
        self.path = given
        self._is_ready = given is not None
        self._lock: FolderLock | None = None
        self._made: list[Path] = []  # folders that this process created, the innermost first
        self._was_free = False

    def open(self, folder: Path) -> None:
        """Lock an existing directory.

        Raises:
            InputError: another process uses it.
        """
        self._lock, self.path = _locked(folder), folder

    def newest_checkpoint(self) -> Path | None:
        """Return the newest whole checkpoint of the run; None: it starts at step 0."""
        return None if self.path is None else newest_good_checkpoint(self.path)

    def enter(self, spec: PreparedSpec, is_resumed: bool = False) -> Path:
        """Write config.yaml into the directory, which is created for a new run; returns the directory.

        Raises:
            InputError: the directory of a new run holds something else, or another process uses it.
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
        """Begin again in place of a start without a checkpoint, whose metrics and samples are dropped."""
        assert self.path is not None
        run_spec.save(spec, self.path / CONFIG)
        run_spec.save_for_hydra(spec.config, self.path / HYDRA)
        side_files.repair(self.path)
        for name in SIDE_FILES:
            (self.path / name).unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete a run that took no step, if this process started it and only a run's own files are in the directory.

        A directory that was there before, empty, is left empty.
        """
        if self.path is None or not self._was_free or not all(_is_own(entry.name) for entry in self.path.iterdir()):
            return
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != folder_lock.NAME:
                entry.unlink(missing_ok=True)
        self.close()
        remove_empty(self._made)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _create(self, spec: PreparedSpec) -> None:
        config = spec.config
        check_free_folder(config)
        is_named, base = bool(config.run_dir or config.name), wanted_folder(config)
        for folder in itertools.repeat(base) if is_named else _numbered(base):
            try:
                if self._start(folder, spec):
                    return
            except InUseError:
                if is_named:
                    raise
            if is_named:
                check_free(folder)  # raises where another process has created it since

    def _start(self, folder: Path, spec: PreparedSpec) -> bool:
        """Fill a directory beside `folder` and rename it; False: `folder` is taken, or another process was faster."""
        place = folder.resolve()
        if not _is_free(place):
            return False
        made, aside = missing(place), place.with_name(f".{place.name}.start")
        if place.is_dir() and (place.is_mount() or any(place.iterdir()) or not can_write(place.parent)):
            aside = place  # which nothing can be renamed to
        elif not _is_free(aside, CONFIG):
            raise InputError(
                f"{aside} is needed to start the run and holds other files.\nMove it, or give another name."
            )
        aside.mkdir(parents=True, exist_ok=True)
        try:
            lock = _locked(aside)
        except FileNotFoundError:  # another process has renamed or removed it
            return False
        run_spec.save(spec, aside / CONFIG)
        if aside != place:
            try:
                aside.rename(place)  # also onto an empty directory
            except OSError as error:
                (aside / CONFIG).unlink()
                lock.release()
                remove_empty([aside])
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return False
                raise
            flush(place.parent)
        lock.folder = place
        self.path, self._lock, self._made, self._was_free = folder, lock, made, True
        return True


def _numbered(base: Path) -> Iterator[Path]:
    yield base
    for number in itertools.count(2):
        yield base.with_name(f"{base.name}-{number}")


def _locked(folder: Path) -> FolderLock:
    """Lock a run's directory, then remove the scratch files of a process that was killed there."""
    lock = FolderLock(folder)
    for entry in folder.iterdir():
        if _is_scratch(entry.name) and entry.is_file():
            entry.unlink(missing_ok=True)
    return lock


def _is_scratch(name: str) -> bool:
    return name.endswith(".tmp") and any(name.startswith(f".{own}.") for own in OWN_FILES)


def _is_own(name: str) -> bool:
    """Whether a run writes a file or folder of this name into its directory, or a scratch file for it."""
    return name in OWN_FILES or _is_scratch(name)


def _is_free(folder: Path, *allowed: str) -> bool:
    """Whether the folder does not exist or holds at most what a killed start left before config.yaml, and `allowed`."""
    if not folder.exists():
        return True
    names = (folder_lock.NAME, *allowed)
    return folder.is_dir() and all(entry.name in names or _is_scratch(entry.name) for entry in folder.iterdir())


def finished_runs(root: Path = RUNS) -> list[FinishedRun]:
    """Finished runs with exported weights under `root`, newest first. Folders that cannot be read are passed over."""
    runs = []
    for file in sorted(root.glob("**/report.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        folder = file.parent
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(report, dict) and report.get("status") == "finished":
                runs.append(FinishedRun(folder, run_spec.load(folder / CONFIG), read_shape(folder / "hf")))
        except (OSError, ValueError):
            continue
    return runs


def kept_checkpoint_message(folder: Path, reached: int | None = None) -> str:
    """Return a sentence on what a run that ended early has kept, and the command that resumes it.

    Args:
        reached: the step it ended after; None: unknown, at least the last one in metrics.csv.
    """
    newest, rows = newest_good_checkpoint(folder), read_metrics(folder)
    last = max(reached or 0, int(rows[-1]["step"]) if rows else 0)
    if newest is None:
        return f"No checkpoint was saved in {folder}; {f'{last} steps are lost' if last else 'no step was logged'}."
    step = step_of(newest)
    if last > step:
        lost = f"steps {step + 1} to {last}{' or later' if reached is None else ''} are lost"
    else:
        lost = "steps after it are lost" if reached is None else "no step is lost"
    return (
        f"The newest checkpoint is of step {step}; {lost}. "
        f"Continue with: python train.py resume={shlex.quote(str(folder))}"
    )
