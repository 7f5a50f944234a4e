"""report.json: reads the report of a run, whose damaged values are left out with a warning."""

import json
import os
from pathlib import Path
from typing import Any

from gpt2lab.storage.damaged_files import read_file, set_aside, warn_once

# Types of the values read by other modules
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("status", "error", "watched_metric", "command"), (str,)),
    **dict.fromkeys(("metrics", "data", "teacher", "hub", "uses"), (dict,)),
    **dict.fromkeys(("seconds", "tokens_per_second", "val_loss", "full_val_loss"), (int, float, type(None))),
}
FINISHED = ("finished", "stopped early")  # statuses of a complete run
# Of the exported model after training: its loss, the standard error between documents, the number of tokens
FINAL_SCORE = ("full_val_loss", "full_val_loss_error", "full_val_tokens")


def is_finished(report: dict[str, Any]) -> bool:
    """Whether the run of a report is complete: it made all its steps, or stopped for lack of improvement."""
    return report.get("status") in FINISHED


def read_report(run_dir: str | Path) -> dict[str, Any]:
    """Read report.json of a run, without values of a wrong type; empty if it is missing or damaged."""
    report, damage = _read(Path(run_dir) / "report.json")
    if damage:
        warn_once(f"{damage} A resumed run keeps the damaged file as report.json.damaged.")
    return report


def repair_report(run_dir: str | Path) -> None:
    """Rename a damaged report.json, with the warning of `read_report`; the run writes a new one when it ends."""
    read_report(run_dir)
    path = Path(run_dir) / "report.json"
    if _read(path)[1]:
        set_aside(path)


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """Return (valid values, one sentence on the damage or "")."""
    if not os.path.lexists(path):
        return {}, ""
    try:
        report = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError):
        report = None
    if not isinstance(report, dict):
        return {}, f"{path} is damaged and is not used."
    wrong = [name for name, kinds in TYPES.items() if name in report and not isinstance(report[name], kinds)]
    damage = f"{path} is damaged: the type of {', '.join(wrong)} is wrong, so the value is not used." if wrong else ""
    return {name: value for name, value in report.items() if name not in wrong}, damage


def watched_value(report: dict[str, Any]) -> float | None:
    """Return the value of the watched metric of the exported weights; None without one."""
    value = report.get("metrics", {}).get(report.get("watched_metric"))
    return float(value) if isinstance(value, int | float) else None
