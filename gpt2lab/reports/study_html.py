"""study.html: a distillation study on one page, with a dot for every run and an interval for every comparison."""

from html import escape

from gpt2lab.analysis.study_results import TIME, ArmResult, Contrast, StudyResults
from gpt2lab.reports.number_format import loss
from gpt2lab.reports.page import render_page, section
from gpt2lab.reports.row_plot import Row, row_plot

ERRORS = ("arm", "mean", "sd over seeds", "standard error between documents")
VERDICTS = ("budget", "comparison", "over seeds", "over documents")
NUMBERS = (*ERRORS[1:], "validation loss", "learning rate")  # columns


def render(title: str, results: StudyResults) -> str:
    """Render the page."""
    teacher = "" if results.teacher_loss is None else f", validation loss {results.teacher_loss:.4f}"
    seeds = ", ".join(map(str, results.seeds))
    has_documents = any(contrast.by_document for contrast in results.contrasts)
    verdicts = "".join(
        f'<tr><td class="name">{escape(contrast.budget)}</td><td class="name">{escape(contrast.title)}</td>'
        f'<td class="words">{escape(contrast.verdict)}</td>'
        + f'<td class="words">{escape(str(contrast.by_document or ""))}</td>' * has_documents
        + "</tr>"
        for contrast in results.contrasts
    )
    body = [
        *(f'<pre class="error">{escape(run)}</pre>' for run in results.failed_runs),
        section("Verdicts", _table(VERDICTS[: 3 + has_documents], verdicts, " stack")),
        section("Differences, with their intervals", _intervals(results.contrasts)),
        section("Every run", _dots(results.arms)),
        section("Errors of the mean losses", _table(ERRORS, _errors(results.arms))),
        section("Learning rates", _table(("arm", "learning rate", "validation loss"), _rates(results))),
    ]
    status = f"Teacher {escape(results.teacher)}{teacher}<br>Seeds {seeds}"
    return render_page(title, f"Is it the teacher? {title}", status, "".join(body))


def _table(names: tuple[str, ...], rows: str, kind: str = "") -> str:
    """Render a table; empty without rows. Of the kind " stack", the cells of a row are below one another on a phone."""
    head = "".join(f'<th class="{"number" if name in NUMBERS else ""}">{name}</th>' for name in names)
    return f'<div class="scroll"><table class="grid{kind}"><tr>{head}</tr>{rows}</table></div>' if rows else ""


def _dots(arms: list[ArmResult]) -> str:
    """Plot one row per arm: its runs as dots, their mean as a bar."""
    if not any(arm.summary.n for arm in arms):
        return "<p>No run finished.</p>"
    rows = [
        Row(
            f"{arm.arm.name}, {arm.steps:,} steps" + (" (time)" if arm.budget == TIME else ""),
            [(found, f"seed {seed}: {found:.4f}") for seed, found in arm.losses.items() if found is not None],
            mean=arm.summary.mean,
            text="" if arm.summary.mean is None else loss(arm.summary.mean),
        )
        for arm in arms
    ]
    return row_plot("validation loss of every run", "validation loss, nats per token (← better)", rows)


def _errors(arms: list[ArmResult]) -> str:
    """Render the error between seeds and between documents of each arm."""
    rows = ""
    for arm in arms:
        values = (arm.summary.mean, arm.summary.sd, arm.document_error)
        cells = "".join(f'<td class="number">{"" if value is None else f"{value:.4f}"}</td>' for value in values)
        rows += f'<tr><td class="name">{escape(arm.arm.name)}, {arm.steps:,} steps</td>{cells}</tr>'
    return rows


def _intervals(contrasts: list[Contrast]) -> str:
    """Plot one row per comparison: the mean difference with its interval."""
    rows = []
    for contrast in contrasts:
        found = contrast.difference
        if found.mean is None:
            continue
        span = (found.low, found.high) if found.low is not None and found.high is not None else None
        text = f"{found.mean:+.3f}".replace("-", "−")
        rows.append(Row(f"{contrast.title} ({contrast.budget})", [(found.mean, text)], span, text=text))
    if not rows:
        return "<p>No pair of runs finished.</p>"
    axis = "difference of the losses, nats per token: below 0 the first is better, above 0 the second"
    return row_plot("difference of every comparison, with its interval", axis, rows, zero=True)


def _rates(results: StudyResults) -> str:
    return "".join(
        f'<tr><td class="name">{escape(rates.arm)}</td>'
        f'<td class="number">{rate:.3g}{", chosen" * (rate == rates.chosen)}</td>'
        f'<td class="number">{"failed" if loss is None else f"{loss:.4f}"}</td></tr>'
        for rates in results.learning_rates
        for rate, loss in rates.losses.items()
    )
