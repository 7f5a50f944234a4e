"""Report of a run: report.json with facts and final metrics, and report.html; also written for a failed run."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from gpt2lab import metric_names
from gpt2lab.evaluation.document_losses import read_document_losses
from gpt2lab.reports.page import shown_path
from gpt2lab.reports.report_html import RunFiles, render
from gpt2lab.reports.run_texts import read_examples
from gpt2lab.reports.samples_jsonl import read_samples
from gpt2lab.storage.atomic_files import write_json, write_text
from gpt2lab.storage.metrics_csv import read_metrics, series

PACKAGES = ("torch", "lightning", "transformers", "hydra-core", "datasets", "tokenizers", "wandb", "peft")
LINKED = (
    "metrics.csv",
    "samples.jsonl",
    "val_examples.json",
    "report.json",
    "config.yaml",
    "hf",
    "checkpoints",
    "logs",
)
WARM_UP_INTERVALS = 1  # log intervals excluded from the median speed: compilation, caches


def build_report(
    run_dir: str | Path, status: str, facts: dict[str, Any], error: str = "", exported_step: int | None = None
) -> dict[str, Any]:
    """Build the report from the caller's facts and the last values in metrics.csv, which a resumed run continues.

    `val_loss_error` is the standard error of val_loss between documents, `val_documents` the number of their groups.

    Args:
        status: finished, stopped early, stopped, pruned or failed.
        facts: task, model, parameters, tokens_seen, seconds, data, command, … in the order of the report.
        error: error message of a failed run.
        exported_step: step of the exported weights, whose validation is reported; None: the last one is.
    """
    rows = read_metrics(run_dir)
    names = [name for name in rows[0] if name != "step"] if rows else []
    last = {name: series(rows, name)[-1][1] for name in names if series(rows, name)}
    measured = [name for name in names if name.startswith(metric_names.MEASURED_BY_VALIDATION)]
    last |= {name: value for name in measured for step, value in series(rows, name) if step == exported_step}
    if exported_step is not None:  # benchmarks of the exported weights only: they may be measured at other steps
        last = {name: value for name, value in last.items() if not name.startswith(metric_names.BENCHMARK_PREFIX)}
        benchmarks = [name for name in names if name.startswith(metric_names.BENCHMARK_PREFIX)]
        last |= {name: value for name in benchmarks for step, value in series(rows, name) if step == exported_step}
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
    """Write report.json, then report.html."""
    write_json(Path(run_dir) / "report.json", report)
    write_page(run_dir, report)


def write_page(run_dir: str | Path, report: dict[str, Any], patience: float = 0.0) -> None:
    """Write report.html with the run's curves, texts and links to its other files.

    Args:
        patience: of a run that trains: seconds until the next page is late.
    """
    folder = Path(run_dir)
    config = folder / "config.yaml"
    run = RunFiles(
        rows=read_metrics(folder),
        samples=read_samples(folder),
        examples=read_examples(folder),
        inside=sorted(page.relative_to(folder).as_posix() for page in folder.glob("inspect/step-*.html")),
        files=[name for name in LINKED if (folder / name).exists()],
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        pages=_pages_of_sources(folder, report),
        folder=shown_path(folder.absolute()),
        patience=patience,
    )
    write_text(folder / "report.html", render(folder.name, report, run))


def _pages_of_sources(folder: Path, report: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return of each run that is the teacher or the initialization the relative path of report.html, and its folder."""
    nodes = [report.get("teacher"), report.get("init")]
    sources = [str(node["source"]) for node in nodes if isinstance(node, dict) and node.get("source")]
    found = {source: Path(source).expanduser().absolute() for source in sources}
    runs = {source: path.parent if path.name == "hf" else path for source, path in found.items()}
    return {
        source: (Path(os.path.relpath(run / "report.html", folder.absolute())).as_posix(), shown_path(run))
        for source, run in runs.items()
        if (run / "report.html").is_file()
    }


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
