"""Compare runs: writes one page with their curves, final values with intervals, and configuration differences.

python -m launch.commands.compare runs/distill/student runs/pretrain/scratch
python -m launch.commands.compare sweeps/2026-11-28_10-30-00 out=sweep-curves.html
"""

import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.exit_codes import exit_without_packages, run_and_exit

if __name__ == "__main__":
    exit_without_packages()

import yaml

from gpt2lab.analysis.sweep_axes import varied_values
from gpt2lab.analysis.sweep_runs import SweepResults, SweepRun, group_runs, summarize
from gpt2lab.errors import InputError
from gpt2lab.evaluation.document_losses import read_document_losses
from gpt2lab.keys import key
from gpt2lab.reports.comparison_html import render, work_notes
from gpt2lab.storage.atomic_files import write_text
from gpt2lab.storage.metrics_csv import read_metrics, series
from gpt2lab.storage.report_json import FINISHED, read_report
from launch.commands.list_runs import read_run
from launch.config import run_spec
from launch.config.key_value_cli import check_output_file, describe, parse
from launch.config.run_dir import CONFIG
from launch.logging_setup import announce

WORK = ("task", "data", "steps", "batch_tokens", "model")  # runs that differ in these did not do the same work
COMPARED = (*FINISHED, "stopped")  # statuses whose value is compared
# Keys that name, place or watch a run without changing what it trains
NOT_COMPARED: tuple[str, ...] = (
    "name",
    "run_dir",
    "resume",
    "plan",
    "plan_memory",
    "invocation",
    "logger",
    "callbacks",
    "n_jobs",
)
NOT_COMPARED += ("cache_dir", "allow_targets", "max_restarts", "rank_timeout", "experiment", "study", "launcher")
NOT_COMPARED += (
    "validate_every",
    "sample_every",
    "checkpoint_every",
    "checkpoint_format",
    "log_every",
    "workers",
    "threads",
)


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command, besides the folders."""

    out: str = key("HTML page to write", "compare.html")


def compare_runs(folders: Sequence[Path], out: Path) -> tuple[SweepResults, list[str]]:
    """Write the page; return the results, and notes on runs that did unequal work.

    Raises:
        InputError: a folder contains no run, or there are fewer than two runs.
    """
    runs = list(dict.fromkeys(run for folder in folders for run in _runs_in(folder)))
    if len(runs) < 2:
        raise InputError("Give at least two run directories, or the folder of a sweep.")
    names = Counter(run.name for run in runs)
    shown = [run.name if names[run.name] == 1 else str(run) for run in runs]
    numbered = enumerate(zip(runs, shown, varied_values(list(map(_configuration, runs))), strict=True))
    found = [as_sweep_run(number, run, name, own, out) for number, (run, name, own) in numbered]
    results = group_runs(found, [])
    rows = list(map(read_metrics, runs))
    write_text(out, render("Comparison", results, rows))
    return results, work_notes(results, rows)


def _runs_in(folder: Path) -> list[Path]:
    """Return the run directory itself, or the runs in the folder, jobs in the order of their numbers."""
    if (folder / CONFIG).is_file():
        return [folder]
    found = [file.parent for file in folder.glob(f"*/{CONFIG}")]
    if not found:
        raise InputError(f"{folder} is neither a run directory nor a folder of runs: there is no {CONFIG} in it.")
    return sorted(found, key=lambda run: (int(run.name) if run.name.isdecimal() else -1, run.name))


def _configuration(folder: Path) -> dict[str, str]:
    """Return the flattened configuration of a run, with the hash of its data.

    Raises:
        InputError: config.yaml is damaged.
    """
    try:
        stored = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        config = stored["config"]
        run_spec.add_new_keys(config)
        content = {name: value for name, value in config.items() if name not in NOT_COMPARED}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        raise InputError(f"{folder / CONFIG} is damaged or of another version, so the run is not compared.") from None
    data = read_report(folder).get("data", {})
    return {**dict(_flat(content)), "data": f"{data.get('name', '')} {data.get('hash', '')}".strip()}


def _flat(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, value as text); the name of a group's preset has the group's key."""
    for name, value in content.items():
        where = above if name in ("name", "_target_") and above else f"{above}.{name}".strip(".")
        if isinstance(value, Mapping):
            yield from _flat(value, where)
        else:
            text = "null" if value is None else str(value)
            yield where, text.rpartition(".")[2].lower() if name == "_target_" else text


def as_sweep_run(number: int, folder: Path, name: str, overrides: dict[str, str], out: Path) -> SweepRun:
    """Return a run directory's state as a job of a sweep, for the page `out`."""
    listed, report = read_run(folder), read_report(folder)
    has_value = listed.status in COMPARED and listed.value is not None and math.isfinite(listed.value)
    page = os.path.relpath(folder / "report.html", out.absolute().parent)
    return SweepRun(
        number=number,
        status=listed.status,
        error=report.get("error", ""),
        page=page if (folder / "report.html").is_file() else "",
        overrides=overrides,
        metric=listed.metric,
        value=listed.value if has_value else None,
        seconds=report.get("seconds"),
        command=report.get("command", ""),
        data=report.get("data", {}).get("hash", ""),
        curve=series(read_metrics(folder), listed.metric),
        documents=read_document_losses(folder),
        name=name,
    )


def main() -> None:
    """Write the page and print the verdict.

    Raises:
        InputError: invalid arguments, or no runs.
    """
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\n{describe(Arguments)}")
        return
    arguments = parse([word for word in words if "=" in word], Arguments)
    check_output_file(arguments.out, "out")
    folders = [Path(word).expanduser() for word in words if "=" not in word]
    announce("Reading the runs")
    results, notes = compare_runs(folders, Path(arguments.out))
    for group in results.groups:
        apart = f"{group.metric} {group.condition}: " if len(results.groups) > 1 else ""
        print(f"{apart}{summarize(group)}\n  {group.best_command}")
    print("".join(f"{note}\n" for note in notes), end="")
    print(f"The runs differ in {', '.join(_differences(results)) or 'nothing that is compared'}.")
    print(arguments.out)


def _differences(results: SweepResults) -> list[str]:
    """Return the keys in which the runs differ, which explain the verdict: first those of the amount of work."""
    keys = dict.fromkeys(name for run in results.runs for name in run.overrides)
    return sorted(keys, key=lambda name: name not in WORK)


if __name__ == "__main__":
    run_and_exit(main)
