"""study.html: a distillation study on one page, with a dot for every run and an interval for every comparison."""

from html import escape

from gpt2lab.analysis.study_results import TIME, ArmResult, Contrast, StudyResults
from gpt2lab.reports.report_html import STYLE
from gpt2lab.reports.svg_rows import OWN_STYLE, ROW, RowPlot


def render(title: str, results: StudyResults) -> str:
    """Render the page."""
    teacher = "" if results.teacher_loss is None else f", validation loss {results.teacher_loss:.4f}"
    seeds = ", ".join(map(str, results.seeds))
    failed = "".join(f'<pre class="error">{escape(run)}</pre>' for run in results.failed_runs)
    verdicts = "".join(
        f"<tr><td>{escape(contrast.budget)}</td><td>{escape(contrast.title)}</td><td>{escape(contrast.verdict)}</td>"
        f"<td>{escape(str(contrast.by_document or ''))}</td></tr>"
        for contrast in results.contrasts
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}{OWN_STYLE}</style></head><body>
<h1>Is it the teacher? {escape(title)}</h1>
<p class="status">Teacher {escape(results.teacher)}{teacher}<br>Seeds {seeds}</p>
{failed}
<h2>Verdicts</h2><table><tr><td></td><td></td><td>over seeds</td><td>over documents</td></tr>{verdicts}</table>
<h2>Differences, with their intervals</h2>{_intervals(results.contrasts)}
<h2>Every run</h2>{_dots(results.arms)}
<h2>Errors of the mean losses</h2><table>{_errors(results.arms)}</table>
<h2>Learning rates</h2><table>{_rates(results)}</table>
</body></html>
"""


def _dots(arms: list[ArmResult]) -> str:
    """Plot one row per arm: its runs as dots, their mean as a bar."""
    rows = [(f"{arm.arm.name}, {arm.steps} steps" + (" (time)" if arm.budget == TIME else ""), arm) for arm in arms]
    values = [loss for arm in arms for loss in arm.losses.values() if loss is not None]
    if not values:
        return "<p>No run finished.</p>"
    plot = RowPlot(values, [label for label, _ in rows], "validation loss, nats per token")
    for row, (_, arm) in enumerate(rows):
        y = plot.y(row)
        for seed, loss in arm.losses.items():
            if loss is not None:
                title = f"<title>seed {seed}: {loss:.4f}</title>"
                plot.parts.append(f'<circle class="run" cx="{plot.x(loss)}" cy="{y}" r="5">{title}</circle>')
        if arm.summary.mean is not None:
            x = plot.x(arm.summary.mean)
            plot.parts.append(f'<line class="mean" x1="{x}" x2="{x}" y1="{y - 9}" y2="{y + 9}"/>')
    return plot.svg("validation loss of every run")


def _errors(arms: list[ArmResult]) -> str:
    """Render the error between seeds and between documents of each arm."""
    rows = "<tr><td></td><td>mean</td><td>sd over seeds</td><td>standard error between documents</td></tr>"
    for arm in arms:
        values = (arm.summary.mean, arm.summary.sd, arm.document_error)
        cells = "".join(f"<td>{'' if value is None else f'{value:.4f}'}</td>" for value in values)
        rows += f"<tr><td>{escape(arm.arm.name)}, {arm.steps} steps</td>{cells}</tr>"
    return rows


def _intervals(contrasts: list[Contrast]) -> str:
    """Plot one row per comparison: the mean difference with its interval."""
    shown = [contrast for contrast in contrasts if contrast.difference.mean is not None]
    values = [
        value
        for contrast in shown
        for value in (contrast.difference.mean, contrast.difference.low, contrast.difference.high)
        if value is not None
    ]
    if not shown:
        return "<p>No pair of runs finished.</p>"
    plot = RowPlot([0.0, *values], [f"{contrast.title} ({contrast.budget})" for contrast in shown], "nats per token")
    zero = plot.x(0.0)
    plot.parts.append(f'<line class="zero" x1="{zero}" x2="{zero}" y1="0" y2="{ROW * len(shown)}"/>')
    for row, contrast in enumerate(shown):
        y, found = plot.y(row), contrast.difference
        if found.low is not None and found.high is not None:
            ends = f'x1="{plot.x(found.low)}" x2="{plot.x(found.high)}"'
            plot.parts.append(f'<line class="interval" {ends} y1="{y}" y2="{y}"/>')
        assert found.mean is not None
        plot.parts.append(f'<circle class="val" cx="{plot.x(found.mean)}" cy="{y}" r="5"/>')
    return plot.svg("difference of every comparison, with its interval")


def _rates(results: StudyResults) -> str:
    return "".join(
        f"<tr><td>{escape(rates.arm)}</td><td>{rate:g}{', chosen' * (rate == rates.chosen)}</td>"
        f"<td>{'failed' if loss is None else f'{loss:.4f}'}</td></tr>"
        for rates in results.learning_rates
        for rate, loss in rates.losses.items()
    )
