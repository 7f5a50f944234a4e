"""Comparison of runs on one page: verdict, final values with intervals, overlaid curves, configuration differences."""

import math
from collections.abc import Sequence
from html import escape

from gpt2lab import metric_names as names
from gpt2lab.analysis.sweep_runs import SEED, SweepResults
from gpt2lab.number_format import column_decimals, fixed
from gpt2lab.reports.charts import Chart, Line, plots, tools
from gpt2lab.reports.page import render_page, section, table
from gpt2lab.reports.run_curves import SIDE_CHARTS, run_clock, thinned, value_at
from gpt2lab.reports.sweep_html import counts, results_html, setting_numbers
from gpt2lab.storage.metrics_csv import series

MOST_POINTS = 300  # of one line
SAME_WORK = 1.02  # ratio of tokens up to which runs did the same work
COLOURS = 8  # of lines, c0 to c7 in page.css; more runs are named at the pointer instead of in a legend
CURVES = {names.VAL_LOSS: "val/loss, nats per target token", names.TRAIN_LOSS: "train/loss, nats per target token"}

Rows = list[dict[str, str]]


def render(title: str, results: SweepResults, rows: Sequence[Rows]) -> str:
    """Render the page.

    Args:
        rows: content of metrics.csv of each run, in the order of `results.runs`.
    """
    status = f"{len(results.runs)} runs: {escape(counts(results))}"
    notes = "".join(f"<p>{escape(note)}</p>" for note in work_notes(results, rows))
    body = notes + results_html(results, is_comparison=True)
    body += section("Curves", curves(results, rows))
    return render_page(title, title, status, body + section("Configuration differences", _differences(results)))


def work_notes(results: SweepResults, rows: Sequence[Rows]) -> list[str]:
    """Return what the verdicts ignore: other data, and unequal numbers of tokens, with the values at equal ones.

    Args:
        rows: as in `render`.
    """
    notes = []
    if len(results.groups) > 1:
        notes.append("Runs with another metric, validation data or tokenizer are not compared with each other.")
    for group in results.groups:
        runs = [run for setting in group.settings for run in setting.runs if run.value is not None]
        clocks = [run_clock(rows[results.runs.index(run)]) for run in runs]
        ends = [clock["tokens"][-1] if clock["tokens"] else math.nan for clock in clocks]
        least, most = min(ends), max(ends)
        if not most > SAME_WORK * least:
            continue
        values = [value_at(run.curve, clock, least) for run, clock in zip(runs, clocks, strict=True)]
        known = [(value, run.name) for run, value in zip(runs, values, strict=True) if value is not None]
        ordered = sorted(known, reverse=not names.lower_is_better(group.metric))
        decimals = column_decimals([value for value, _ in known], names.lower_is_better(group.metric))
        shown = ", ".join(f"{name} {fixed(value, decimals)}" for value, name in ordered) or "not measured"
        notes.append(
            f"The runs trained on {least:,.0f} to {most:,.0f} tokens, so the verdict compares unequal work. "
            f"{group.metric} of each after {least:,.0f} tokens: {shown}. Longer runs had not lowered their learning "
            "rate as far there."
        )
    return notes


def curves(results: SweepResults, rows: Sequence[Rows]) -> str:
    """Render the overlaid curves of all runs; empty before any has a value. Arguments as in `render`."""
    setting_of = {run.number: setting for setting in results.settings for run in setting.runs}
    numbers, is_few = setting_numbers(results), len(rows) <= COLOURS
    watched = {group.metric: group.metric for group in results.groups}
    charts = []
    for metric, title in {**watched, **CURVES, **SIDE_CHARTS}.items():
        lines = []
        for index, (run, own) in enumerate(zip(results.runs, rows, strict=True)):
            setting = setting_of[run.number]
            number = numbers[setting.name]
            name = run.name if is_few else f"{run.name}: {setting.label}"
            colour = f"c{(index if is_few else number) % COLOURS}"  # of many runs, those of a setting share it
            points = thinned(series(own, metric), MOST_POINTS)
            lines.append(Line(name, points, colour, metric != names.VAL_LOSS, setting=number, clock=index))
        shown = [line for line in lines if line.points]
        charts.append(Chart(title, shown, is_wide=metric in {**watched, **CURVES}, names_nearest=not is_few))
    drawn = plots(charts)
    return tools([run_clock(own) for own in rows], True) + drawn if drawn else ""


def _differences(results: SweepResults) -> str:
    """Render the keys in which the runs differ, a column per run."""
    keys = dict.fromkeys(key for run in results.runs for key in run.overrides)
    varied = [key for key in keys if len({run.overrides.get(key) for run in results.runs}) > 1]
    ordered = sorted(varied, key=lambda key: (key != SEED, key))
    if not ordered:
        return "<p>The configurations are equal.</p>"
    columns = [("", "name"), *((run.name, "") for run in results.runs)]
    rows = [("", [escape(key), *(escape(run.overrides.get(key, "–")) for run in results.runs)]) for key in ordered]
    return table(columns, rows)
