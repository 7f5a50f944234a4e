"""Run folders: where a run lies, how it is made, and how earlier runs are found by report.json and config.yaml."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from gpt2lab.atomic_files import can_write
from gpt2lab.errors import InputError
from gpt2lab.model_folder import read_shape
from launch.configuration import config as configuration
from launch.configuration.config import Config

RUNS, STUDIES = Path("runs"), Path("studies")
OWN_ROOTS = ("runs", "sweeps", "studies")


@dataclass(frozen=True)
class FinishedRun:
    """An earlier run that has a report, a configuration and exported weights of a known shape."""

    folder: Path
    config: Config
    shape: dict[str, int]


def check_name(config: Config) -> None:
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


def wanted_folder(config: Config) -> Path:
    """run_dir, else runs/<task>/<name>, else runs/<task>/<model>-<time>; of a study studies/<name>, studies/<time>."""
    if config.run_dir:
        return Path(config.run_dir).expanduser()
    now, model = time.strftime("%Y-%m-%d_%H-%M-%S"), config.record.groups["model"]
    if config.is_study:
        return STUDIES / (config.name or now)
    return RUNS / config.task_name / (config.name or f"{model}-{now}")


def check_free(folder: Path) -> None:
    """The folder can be made here and holds nothing yet.

    Raises:
        InputError
    """
    if folder.is_dir() and any(folder.iterdir()):
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
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not can_write(existing):
        raise InputError(f"Cannot make the folder {folder}: {existing} cannot be written to.\nGive another {key}.")


def check_wanted(config: Config) -> None:
    """A named folder is free; one named by the time can be made, and gets a number where another run took that name.

    Raises:
        InputError
    """
    if config.run_dir or config.name:
        check_free(wanted_folder(config))
    else:
        check_can_be_made(wanted_folder(config), "run_dir")


def make(config: Config) -> Path:
    """Make the run's folder; without a name of its own, one that another run took in the same second gets a number."""
    check_wanted(config)
    folder, number = wanted_folder(config), 1
    if config.run_dir or config.name:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    base = folder
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = base.with_name(f"{base.name}-{number}")


def remove(folder: Path) -> None:
    """Delete a run's folder that nothing came of."""
    shutil.rmtree(folder, ignore_errors=True)
    remove_empty(folder)


def remove_empty(folder: Path) -> None:
    """Delete a folder, and below runs/ and sweeps/ those above it, as far as they are empty."""
    for path in [folder, *(above for above in folder.parents if above.parts and above.parts[0] in OWN_ROOTS)]:
        try:
            path.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return


def remove_if_untrained(folder: Path, is_new: bool) -> None:
    """Leave nothing behind of a new run that ended before its first logged step."""
    metrics = folder / "metrics.csv"
    has_metrics = metrics.is_file() and metrics.stat().st_size > 0
    if is_new and not has_metrics and not (folder / "checkpoints").exists():
        remove(folder)


def finished_runs(root: Path = RUNS) -> list[FinishedRun]:
    """Finished runs with exported weights under `root`, newest first. Folders that cannot be read are passed over."""
    runs = []
    for file in sorted(root.glob("**/report.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        folder = file.parent
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(report, dict) and report.get("status") == "finished":
                config, shape = configuration.load(folder / "config.yaml"), read_shape(folder / "hf")
                runs.append(FinishedRun(folder, config, shape))
        except (OSError, ValueError):
            continue
    return runs
