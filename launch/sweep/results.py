"""Sweep results: sweep.csv, sweep.html and the terminal table of a sweep's jobs."""

import math
import shlex
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from gpt2lab.analysis.sweep_axes import override_value, varied_values
from gpt2lab.analysis.sweep_runs import NAMED, SweepResults, SweepRun, format_gap, format_value, group_runs, summarize
from gpt2lab.evaluation.document_losses import DocumentLosses, read_document_losses
from gpt2lab.metric_names import lower_is_better
from gpt2lab.number_format import column_decimals, fixed
from gpt2lab.reports.sweep_html import render
from gpt2lab.storage.atomic_files import write_text
from gpt2lab.storage.metrics_csv import read_metrics, series
from gpt2lab.storage.report_json import read_report
from launch.config.unused_keys import given_keys
from launch.sweep import jobs
from launch.sweep.jobs import Job
from launch.sweep.text_table import aligned, wrapped

FIRST_COLUMNS = ("job", "status", "watched_metric", "watched", "val_loss", "seconds", "tokens_per_second")
LAST_COLUMNS = ("overrides", "error", "command")
ERRORS = "± of a value: half its 95 % interval; behind the best by more than its ±: worse, else a tie"


def write(folder: Path, planned: Sequence[Job]) -> None:
    """Write sweep.csv and sweep.html; called after every job, so that both are always current."""
    varied = _varied_keys(planned)
    columns = [*FIRST_COLUMNS, *dict.fromkeys(key for keys in varied for key in keys), *LAST_COLUMNS]
    rows = [_row(job, keys) for job, keys in zip(planned, varied, strict=True)]
    jobs.write_csv(folder / "sweep.csv", columns, rows)
    write_text(folder / "sweep.html", render(folder.name, collect_results(folder, planned)))


def format_results(folder: Path, planned: Sequence[Job], width: int | None = None) -> str:
    """Format the terminal table: one line per setting if there are several seeds, else per job; then the best run.

    Args:
        width: columns of the terminal; None: lines are not wrapped. Commands never are, so that they can be copied.
    """
    found = collect_results(folder, planned)
    lines = [aligned(_settings(found) if found.has_seeds else _jobs(planned), width)]
    lines += [wrapped(ERRORS, width)] if found.has_seeds else []
    lines += [wrapped(line, width) for line in _by_document(found)]
    for group in found.groups if len(found.settings) > 1 else []:
        apart = f"{group.metric} {group.condition}: " if len(found.groups) > 1 else ""
        lines += ["", wrapped(apart + summarize(group), width), f"  {group.best_command}"]
    return "\n".join([*lines, "", f"{folder}/sweep.csv", f"{folder}/sweep.html"])


def collect_results(folder: Path, planned: Sequence[Job]) -> SweepResults:
    """Collect the reports of all jobs, grouped by setting."""
    runs = [_run(folder, job, keys) for job, keys in zip(planned, _varied_keys(planned), strict=True)]
    return group_runs(runs, _shared_overrides(planned))


def _run(folder: Path, job: Job, varied: dict[str, str]) -> SweepRun:
    report, curve, documents = _read_job(job)
    is_number = job.status == "finished" and job.watched is not None and math.isfinite(job.watched)
    return SweepRun(
        number=job.number,
        status=job.status,
        error=job.error,
        page=f"{job.folder.relative_to(folder)}/report.html" if report else "",
        overrides=varied,
        metric=report.get("watched_metric", ""),
        value=job.watched if is_number else None,
        seconds=report.get("seconds"),
        command=_command(job, report),
        data=report.get("data", {}).get("hash", ""),
        curve=curve,
        documents=documents,
    )


def _read_job(job: Job) -> tuple[dict[str, Any], list[tuple[int, float]], DocumentLosses | None]:
    """Report (empty if missing), (step, value) curve of the watched metric, and validation losses by document."""
    file = job.folder / "report.json"
    return _read(job.folder, file.stat().st_mtime_ns) if file.exists() else ({}, [], None)


@cache
def _read(folder: Path, mtime: int) -> tuple[dict[str, Any], list[tuple[int, float]], DocumentLosses | None]:
    """Read a job, cached by modification time, because the end of every job reads all of them."""
    report = read_report(folder)
    return report, series(read_metrics(folder), report.get("watched_metric", "")), read_document_losses(folder)


def _varied_keys(planned: Sequence[Job]) -> list[dict[str, str]]:
    """Return for each job its overrides of the keys in which the jobs differ, as {key: value}."""
    return varied_values([_given(job.overrides) for job in planned])


def varied_keys(combinations: Sequence[Sequence[str]]) -> list[str]:
    """Return the keys in which the combinations of overrides differ."""
    values = varied_values([_given(overrides) for overrides in combinations])
    return [*dict.fromkeys(key for own in values for key in own)]


def _given(overrides: Sequence[str]) -> dict[str, str]:
    return {given_keys([one])[0]: one.partition("=")[2] for one in overrides}


def _shared_overrides(planned: Sequence[Job]) -> list[str]:
    """Overrides that all jobs have in common; empty for a single job."""
    if len(planned) < 2:
        return []
    common = set.intersection(*(set(job.overrides) for job in planned))
    return [override for override in planned[0].overrides if override in common]


def _row(job: Job, varied: dict[str, str]) -> dict[str, Any]:
    """A row of sweep.csv."""
    report = _read_job(job)[0]
    shown = {name: report.get(name, "") for name in ("watched_metric", "val_loss", "seconds", "tokens_per_second")}
    own = {"job": job.number, "status": job.status, "overrides": shlex.join(job.overrides)}
    outcome = {"error": job.error, "watched": "" if job.watched is None else job.watched}
    return {**shown, **varied, **own, **outcome, "command": _command(job, report)}


def _command(job: Job, report: dict[str, Any]) -> str:
    """Command that repeats the job; the one in its report leaves out keys that its task does not read."""
    return str(report.get("command") or jobs.single_run_command(job.overrides))


def _jobs(planned: Sequence[Job]) -> list[tuple[str, ...]]:
    """Header and one line per job, with the overrides in which the jobs differ."""
    shared = _shared_overrides(planned)
    lines: list[tuple[str, ...]] = [("folder", "status", "watched", "value", "seconds", "overrides")]
    rows = [_row(job, {}) for job in planned]
    decimals = {
        metric: column_decimals(
            [row["watched"] for row in rows if row["watched_metric"] == metric and row["watched"] != ""],
            lower_is_better(metric),
        )
        for metric in {row["watched_metric"] for row in rows}
    }
    for job, row in zip(planned, rows, strict=True):
        value = "" if job.watched is None else fixed(job.watched, decimals[row["watched_metric"]])
        seconds = f"{row['seconds']:.0f}" if row["seconds"] != "" else ""
        own = short_overrides(override for override in job.overrides if override not in shared)
        lines.append((str(job.number), job.status, row["watched_metric"], value, seconds, own))
    return lines


def short_overrides(overrides: Iterable[str]) -> str:
    """Join overrides as in a shell, numbers with three significant digits."""
    parts = (override.partition("=") for override in overrides)
    return shlex.join(f"{key}{equals}{override_value(value)}" for key, equals, value in parts)


def _settings(found: SweepResults) -> list[tuple[str, ...]]:
    """Header and one line per setting, best first."""
    metrics = {group.metric for group in found.groups}
    lines: list[tuple[str, ...]] = [
        (
            "",
            metrics.pop() if len(metrics) == 1 else "value",
            "behind the best",
            "runs",
            "seconds",
            "folders",
            "setting",
        )
    ]
    group_of = {setting.name: group for group in found.groups for setting in group.settings}
    for setting in found.settings:
        group = group_of.get(setting.name)
        seconds = "" if setting.seconds is None else f"{setting.seconds:.0f}"
        numbers = ",".join(str(run.number) for run in setting.runs)
        standing = group.status_of(setting) if group else ""
        behind = format_gap(group, setting)
        lines.append(
            (standing, format_value(group, setting), behind, setting.statuses, seconds, numbers, setting.label)
        )
    return lines


def _by_document(found: SweepResults) -> list[str]:
    """Differences to the best setting, paired by document, for the next best settings."""
    lines = []
    for group in found.groups:
        for setting in group.settings[1 : NAMED + 1]:
            difference = group.by_document(setting)
            lines += [f"  {setting.label} − {group.best.label}: {difference}"] if difference else []
    return ["", "Paired by document, without the error between seeds", *lines] if lines else []
