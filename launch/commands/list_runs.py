"""List runs: prints each run below a folder with its status, step, score, age and the command that resumes it.

python -m launch.commands.list_runs
python -m launch.commands.list_runs root=sweeps/2026-11-28_10-30-00
"""

import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.exit_codes import exit_without_packages, run_and_exit

if __name__ == "__main__":
    exit_without_packages()

from rich.console import Console
from rich.table import Table

from gpt2lab.errors import InputError
from gpt2lab.keys import key
from gpt2lab.storage.checkpoint_ledger import checkpoint_files, checkpoint_step
from gpt2lab.storage.folder_lock import is_locked
from gpt2lab.storage.metrics_csv import STEP, read_metrics
from gpt2lab.storage.report_json import is_finished, read_report, watched_value
from gpt2lab.system.terminal import is_live, track
from launch.config.key_value_cli import describe, parse
from launch.config.run_dir import CONFIG, RUNS

RUNNING, INTERRUPTED, UNSAVED, UNSTARTED = "running", "interrupted", "no checkpoint", "not started"
UNWRAPPED = 10_000  # columns of a pipe or file, whose reader expects a run in one line
UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))
STEPS = re.compile(r"^ {2}steps: (\d+)$", re.MULTILINE)  # of the run, in config.yaml


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command."""

    root: str = key("folder that contains run directories, at any depth", default=str(RUNS))


@dataclass(frozen=True)
class ListedRun:
    """A run directory; `step` is the last one in metrics.csv, `steps` what the run was given, `age` in seconds."""

    folder: Path
    status: str
    step: int
    steps: int | None
    metric: str
    value: float | None
    age: float
    resume_command: str


def find_runs(root: Path) -> list[ListedRun]:
    """Return all runs below a folder, the one that changed last first.

    Raises:
        InputError: the folder does not exist.
    """
    if not root.is_dir():
        raise InputError(f"root={root}: there is no such folder.\nGive the folder that contains the run directories.")
    folders = [file.parent for file in root.glob(f"**/{CONFIG}") if ".hydra" not in file.parts]
    return sorted(map(read_run, track(folders, "read", len(folders), "runs")), key=lambda run: run.age)


def read_run(folder: Path) -> ListedRun:
    """Return a run directory's state."""
    report, rows = read_report(folder), read_metrics(folder)
    status = _status(folder, report, has_steps=bool(rows))
    is_done = is_finished(report) or report.get("status") == "pruned"
    command = f"python train.py resume={shlex.quote(str(folder))}" if not is_done and status != RUNNING else ""
    changed = max(path.stat().st_mtime for path in (folder, *folder.iterdir()) if path.exists())
    given = STEPS.search((folder / CONFIG).read_text(encoding="utf-8", errors="replace"))
    return ListedRun(
        folder=folder,
        status=status,
        step=int(rows[-1][STEP]) if rows else 0,
        steps=int(given[1]) if given else None,
        metric=report.get("watched_metric", ""),
        value=watched_value(report),
        age=max(time.time() - changed, 0.0),
        resume_command=command,
    )


def _status(folder: Path, report: dict[str, Any], *, has_steps: bool) -> str:
    """Return the status of the report, unless the run is active, or was resumed and killed after it."""
    if is_locked(folder):
        return RUNNING
    checkpoints = checkpoint_files(folder)
    if report.get("status") and not any(checkpoint_step(file) > report.get("steps", 0) for file in checkpoints):
        return str(report["status"])
    if checkpoints:
        return INTERRUPTED
    return UNSAVED if has_steps else UNSTARTED


def format_runs(runs: list[ListedRun]) -> Table:
    """Return the table of runs."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "status", "step", "score", "age"):
        is_number = name in ("step", "age")
        table.add_column(name, justify="right" if is_number else "left", overflow="fold", no_wrap=name != "run")
    for run in runs:
        score = "" if run.value is None else f"{run.metric} {run.value:.4f}"
        step = f"{run.step}/{run.steps}" if run.steps else str(run.step)
        table.add_row(str(run.folder), run.status, step, score, format_age(run.age))
    return table


def format_age(seconds: float) -> str:
    """Return a time as a whole number of its largest unit, rounded down: 90 s → 1 min."""
    size, unit = next(((size, unit) for size, unit in UNITS if seconds >= size), UNITS[-1])
    return f"{int(seconds // size)} {unit}"


def main() -> None:
    """Print the runs, then the commands that resume the unfinished ones.

    Raises:
        InputError: invalid arguments, or no such folder.
    """
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\n{describe(Arguments)}")
        return
    arguments = parse(words, Arguments)
    runs = find_runs(Path(arguments.root).expanduser())
    if not runs:
        print(f"There are no runs in {arguments.root}.")
        return
    Console(highlight=False, width=None if is_live(sys.stdout) else UNWRAPPED).print(format_runs(runs))
    commands = [run.resume_command for run in runs if run.resume_command]
    if commands:
        print("\n".join(["", "Unfinished runs continue with:", *(f"  {command}" for command in commands)]))


if __name__ == "__main__":
    run_and_exit(main)
