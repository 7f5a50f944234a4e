"""Contents of the offline W&B runs in a run directory, and whether they equal metrics.csv and samples.jsonl."""

import json
from pathlib import Path
from typing import Any

from callbacks.loggers.wandb_file import read_records, read_rows
from gpt2lab.reports.samples_jsonl import read_samples
from gpt2lab.storage.metrics_csv import read_metrics


def runs_in(run_dir: Path) -> list[Any]:
    """Return the run (`run_id`, `run_group`, `display_name`, …) of every offline folder in a run directory."""
    return [record.run for file in files_in(run_dir) for record in read_records(file) if record.HasField("run")]


def files_in(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))


def summary_in(run_dir: Path) -> dict[str, Any]:
    """Return the plain values of the summary of the only offline run in a run directory."""
    (file,) = files_in(run_dir)
    updates = [item for record in read_records(file) if record.HasField("summary") for item in record.summary.update]
    return {item.key: json.loads(item.value_json) for item in updates if item.key}


def assert_one_complete_run(run_dir: Path) -> None:
    """Check that there is one offline folder, with the rows of metrics.csv and the samples of samples.jsonl."""
    (file,) = files_in(run_dir)
    rows, expected = read_rows(file), read_metrics(run_dir)
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)), "steps increase strictly"
    assert steps == [int(row["step"]) for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        for name, text in wanted.items():
            assert not text or abs(row[name] - float(text)) <= 1e-6 * abs(float(text)), (row["step"], name)
    assert sampled(file) == [(one.step, one.method, one.prompt, one.completion) for one in read_samples(run_dir)]


def sampled(file: Path) -> list[tuple[Any, ...]]:
    """Return the rows of the tables of samples in the order of the steps."""
    tables = [row["samples"]["path"] for row in read_rows(file) if "samples" in row]
    contents = [json.loads((file.parent / "files" / path).read_text())["data"] for path in tables]
    return [tuple(row) for data in contents for row in data]
