"""Comparison of runs on one page: verdict, final values with intervals, overlaid curves, configuration differences."""

from collections.abc import Sequence
from html import escape

from gpt2lab import metric_names as names
from gpt2lab.analysis.sweep_runs import SEED, SweepResults
from gpt2lab.reports.charts import Chart, Line, plots, tools
from gpt2lab.reports.page import render_page, section
from gpt2lab.reports.run_curves import SIDE_CHARTS, run_clock, thinned
from gpt2lab.reports.sweep_html import counts, results_html, setting_numbers
from gpt2lab.storage.metrics_csv import series

MOST_POINTS = 300  # of one line
COLOURS = 8  # of lines, c0 to c7 in page.css; more runs are named at the pointer instead of in a legend
CURVES = {names.VAL_LOSS: "val/loss, nats per target token", names.TRAIN_LOSS: "train/loss, nats per target token"}

Rows = list[dict[str, str]]


def render(title: str, results: SweepResults, rows: Sequence[Rows]) -> str:
    """Render the page.

    Args:
        rows: content of metrics.csv of each run, in the order of `results.runs`.
    """
    status = f"{len(results.runs)} runs: {escape(counts(results))}"
    body = results_html(results, has_curves=False) + section("Curves", curves(results, rows))
    return render_page(title, title, status, body + section("Configuration differences", _differences(results)))


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
    head = "".join(f"<th>{escape(run.name)}</th>" for run in results.runs)
    body = "".join(
        f'<tr><td class="name">{escape(key)}</td>'
        + "".join(f"<td>{escape(run.overrides.get(key, '–'))}</td>" for run in results.runs)
        + "</tr>"
        for key in ordered
    )
    return (
        f'<div class="scroll"><table class="grid"><tr><th></th>{head}</tr>{body}</table></div>'
        if body
        else ("<p>The configurations are equal.</p>")
    )
