"""Sweep results: what a sweep leaves of its jobs: sweep.csv, sweep.html and a table on the terminal."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from gpt2lab.analysis.sweep_runs import (
    NAMED,
    SweepResults,
    SweepRun,
    behind_in_words,
    gathered,
    in_one_sentence,
    value_in_words,
)
from gpt2lab.evaluation.document_losses import DocumentLosses, read_document_losses
from gpt2lab.reports.run_report import read_report
from gpt2lab.reports.sweep_html import render
from gpt2lab.storage.atomic_files import write_text
from gpt2lab.storage.metrics_csv import read_metrics, series
from launch.config import unused_keys
from launch.sweep import jobs
from launch.sweep.jobs import Job

FIRST_COLUMNS = ("job", "status", "watched_metric", "watched", "val_loss", "seconds", "tokens_per_second")
LAST_COLUMNS = ("overrides", "error", "command")


def write(folder: Path, planned: Sequence[Job]) -> None:
    """Write sweep.csv and sweep.html; called after every job, so that both can be read at any time."""
    told = _told(planned)
    columns = [*FIRST_COLUMNS, *dict.fromkeys(key for keys in told for key in keys), *LAST_COLUMNS]
    rows = [_row(job, keys) for job, keys in zip(planned, told, strict=True)]
    jobs.write_csv(folder / "sweep.csv", columns, rows)
    write_text(folder / "sweep.html", render(folder.name, results(folder, planned)))


def in_words(folder: Path, planned: Sequence[Job]) -> str:
    """What the terminal shows at the end: settings where they have several seeds, else jobs; who won, and how again."""
    found = results(folder, planned)
    lines = [_settings(found) if found.has_seeds else _jobs(planned)]
    lines += _by_document(found)
    for contest in found.contests if len(found.settings) > 1 else []:
        apart = f"{contest.metric} {contest.apart}: " if len(found.contests) > 1 else ""
        lines += ["", apart + in_one_sentence(contest), f"  {contest.best_command}"]
    return "\n".join([*lines, "", f"{folder}/sweep.csv", f"{folder}/sweep.html"])


def results(folder: Path, planned: Sequence[Job]) -> SweepResults:
    """The jobs with what their reports say, gathered by setting."""
    runs = [_run(folder, job, keys) for job, keys in zip(planned, _told(planned), strict=True)]
    return gathered(runs, _shared(planned))


def _run(folder: Path, job: Job, told: dict[str, str]) -> SweepRun:
    report, curve, documents = _reported(job)
    is_number = job.status == "finished" and job.watched is not None and math.isfinite(job.watched)
    return SweepRun(
        number=job.number,
        status=job.status,
        error=job.error,
        page=f"{job.folder.relative_to(folder)}/report.html" if report else "",
        told=told,
        metric=report.get("watched_metric", ""),
        value=job.watched if is_number else None,
        seconds=report.get("seconds"),
        command=_command(job, report),
        data=report.get("data", {}).get("hash", ""),
        curve=curve,
        documents=documents,
    )


def _reported(job: Job) -> tuple[dict[str, Any], list[tuple[int, float]], DocumentLosses | None]:
    """A job's report, empty where there is none yet, the curve of its watched metric, its validation by document."""
    file = job.folder / "report.json"
    return _read(job.folder, file.stat().st_mtime_ns) if file.exists() else ({}, [], None)


@cache
def _read(folder: Path, written: int) -> tuple[dict[str, Any], list[tuple[int, float]], DocumentLosses | None]:
    """The three of `_reported`, read once for each time that they were written: every job's end reads all of them."""
    report = read_report(folder)
    return report, series(read_metrics(folder), report.get("watched_metric", "")), read_document_losses(folder)


def _told(planned: Sequence[Job]) -> list[dict[str, str]]:
    """Of each job, the values of the keys in which the jobs differ; a key that it was not told is left out."""
    given = [
        dict(zip(unused_keys.given_keys(job.overrides), (_value(one) for one in job.overrides), strict=True))
        for job in planned
    ]
    keys = dict.fromkeys(key for own in given for key in own)
    varied = [key for key in keys if len({own.get(key) for own in given}) > 1]
    return [{key: own[key] for key in varied if key in own} for own in given]


def _value(override: str) -> str:
    return override.partition("=")[2]


def _shared(planned: Sequence[Job]) -> list[str]:
    """The overrides that all jobs have, of several."""
    if len(planned) < 2:
        return []
    common = set.intersection(*(set(job.overrides) for job in planned))
    return [override for override in planned[0].overrides if override in common]


def _row(job: Job, told: dict[str, str]) -> dict[str, Any]:
    """A line of sweep.csv."""
    report = _reported(job)[0]
    shown = {name: report.get(name, "") for name in ("watched_metric", "val_loss", "seconds", "tokens_per_second")}
    own = {"job": job.number, "status": job.status, "overrides": unused_keys.in_words(job.overrides)}
    became = {"error": job.error, "watched": "" if job.watched is None else job.watched}
    return {**shown, **told, **own, **became, "command": _command(job, report)}


def _command(job: Job, report: dict[str, Any]) -> str:
    """That runs the job again: as its report has it, without the keys that its task does not read."""
    return str(report.get("command") or jobs.command_of(job.overrides))


def _jobs(planned: Sequence[Job]) -> str:
    """One line a job, with the overrides in which the jobs differ."""
    shared = _shared(planned)
    lines = [("job", "status", "watched", "value", "seconds", "overrides")]
    for job in planned:
        row = _row(job, {})
        value = "" if job.watched is None else f"{job.watched:.4f}"
        seconds = f"{row['seconds']:.0f}" if row["seconds"] != "" else ""
        own = unused_keys.in_words(override for override in job.overrides if override not in shared)
        lines.append((str(job.number), job.status, row["watched_metric"], value, seconds, own))
    return _aligned(lines)


def _settings(found: SweepResults) -> str:
    """One line a setting, best first."""
    metrics = {contest.metric for contest in found.contests}
    lines = [
        ("", metrics.pop() if len(metrics) == 1 else "value", "behind the best", "runs", "seconds", "jobs", "setting")
    ]
    contest_of = {setting.name: contest for contest in found.contests for setting in contest.settings}
    for setting in found.settings:
        contest = contest_of.get(setting.name)
        seconds = "" if setting.seconds is None else f"{setting.seconds:.0f}"
        numbers = ",".join(str(run.number) for run in setting.runs)
        standing = contest.standing(setting) if contest else ""
        behind = behind_in_words(contest, setting)
        lines.append((standing, value_in_words(setting), behind, setting.statuses, seconds, numbers, setting.name))
    return (
        _aligned(lines)
        + "\n± of a value: half its 95 % interval; behind the best by more than its ±: worse, else a tie"
    )


def _by_document(found: SweepResults) -> list[str]:
    """The settings next to the best, each with its difference paired by document."""
    lines = []
    for contest in found.contests:
        for setting in contest.settings[1 : NAMED + 1]:
            difference = contest.by_document(setting)
            lines += [f"  {setting.name} − {contest.best.name}: {difference}"] if difference else []
    return ["", "Paired by document, without the error between seeds", *lines] if lines else []


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )
