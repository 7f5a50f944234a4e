"""Report of a run: report.json with facts and final metrics, and report.html; also written for a failed run."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from gpt2lab import metric_names
from gpt2lab.evaluation.document_losses import read_document_losses
from gpt2lab.reports.report_html import render
from gpt2lab.reports.samples_jsonl import read_samples
from gpt2lab.storage.atomic_files import write_json, write_text
from gpt2lab.storage.damaged_files import set_aside, warn_once
from gpt2lab.storage.metrics_csv import read_metrics, series

PACKAGES = ("torch", "lightning", "transformers", "hydra-core", "datasets", "tokenizers", "wandb", "peft")
# Types of the values read by other modules
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("status", "error", "watched_metric", "command"), (str,)),
    **dict.fromkeys(("metrics", "data", "teacher"), (dict,)),
    **dict.fromkeys(("seconds", "tokens_per_second", "val_loss"), (int, float, type(None))),
}
WARM_UP_INTERVALS = 1  # log intervals excluded from the median speed: compilation, caches


def build_report(run_dir: str | Path, status: str, facts: dict[str, Any], error: str = "") -> dict[str, Any]:
    """Build the report from the caller's facts and the last values in metrics.csv, which a resumed run continues.

    `val_loss_error` is the standard error of val_loss between documents, `val_documents` the number of their groups.

    Args:
        status: finished, stopped, pruned or failed.
        facts: task, model, parameters, tokens_seen, seconds, data, command, … in the order of the report.
        error: error message of a failed run.
    """
    rows = read_metrics(run_dir)
    names = [name for name in rows[0] if name != "step"] if rows else []
    last = {name: series(rows, name)[-1][1] for name in names if series(rows, name)}
    by_document = read_document_losses(run_dir)
    report: dict[str, Any] = {"status": status, **({"error": error} if error else {}), **facts}
    report |= {
        "tokens_per_second": _typical(rows, metric_names.TOKENS_PER_SECOND),
        "mfu": _typical(rows, metric_names.MFU),
        "train_loss": last.get(metric_names.TRAIN_LOSS),
        "val_loss": last.get(metric_names.VAL_LOSS),
        "val_loss_error": by_document.standard_error if by_document else None,
        "val_documents": len(by_document.targets) if by_document else None,
        "val_perplexity": last.get(metric_names.VAL_PERPLEXITY),
        "bits_per_byte": last.get(metric_names.VAL_BITS_PER_BYTE),
        "metrics": last,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "git": git_state(),
    }
    return report


def write_report(run_dir: str | Path, report: dict[str, Any]) -> None:
    """Write report.json, then report.html with the run's loss curve and samples."""
    folder = Path(run_dir)
    write_json(folder / "report.json", report)
    inside = sorted(page.relative_to(folder).as_posix() for page in folder.glob("inspect/step-*.html"))
    write_text(folder / "report.html", render(folder.name, report, read_metrics(folder), read_samples(folder), inside))


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
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        report = None
    if not isinstance(report, dict):
        return {}, f"{path} is damaged and is not used."
    wrong = [name for name, kinds in TYPES.items() if name in report and not isinstance(report[name], kinds)]
    damage = f"{path} is damaged: the type of {', '.join(wrong)} is wrong, so the value is not used." if wrong else ""
    return {name: value for name, value in report.items() if name not in wrong}, damage


def watched_value(report: dict[str, Any]) -> float | None:
    """Return the last value of the watched metric; None without one."""
    value = report.get("metrics", {}).get(report.get("watched_metric"))
    return float(value) if isinstance(value, int | float) else None


def git_state() -> dict[str, Any] | None:
    """Return the commit of this project and whether tracked files changed; None outside a git checkout."""
    root = str(Path(__file__).resolve().parents[2])
    if not Path(root, "setup.sh").is_file():  # installed; a checkout around site-packages is another project's
        return None
    try:
        commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "-C", root, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.stdout.strip(), "changed": bool(status.stdout.strip())}


def _typical(rows: list[dict[str, str]], name: str) -> float | None:
    values = [value for _, value in series(rows, name)]
    return median(values[WARM_UP_INTERVALS:] or values) if values else None
