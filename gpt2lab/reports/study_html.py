"""study.html: a distillation study on one page, with a dot for every run and an interval for every comparison."""

from html import escape

from gpt2lab.analysis.study_results import TIME, Contrast, StudyResults
from gpt2lab.number_format import fixed, significant
from gpt2lab.reports.page import render_page, section, shown_path, table
from gpt2lab.reports.row_plot import Row, row_plot

ERRORS = [
    ("arm", "name"),
    *((name, "number") for name in ("mean", "sd over seeds", "standard error between documents")),
]
RATES = [("arm", "name"), ("learning rate", "number"), ("validation loss", "number")]
VERDICTS = ("budget", "comparison", "over seeds", "over documents")


def render(title: str, results: StudyResults) -> str:
    """Render the page."""
    teacher = "" if results.teacher_loss is None else f", validation loss {significant(results.teacher_loss)}"
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
        section("Verdicts", _verdicts(verdicts, has_documents)),
        section("Differences, with their intervals", _intervals(results.contrasts)),
        section("Every run", _dots(results)),
        section("Errors of the mean losses", table(ERRORS, _errors(results))),
        section("Learning rates", table(RATES, rates) if (rates := _rates(results)) else ""),
    ]
    status = f"Teacher {escape(shown_path(results.teacher))}{teacher}<br>Seeds {seeds}"
    return render_page(title, f"Is it the teacher? {title}", status, "".join(body))


def _verdicts(rows: str, has_documents: bool) -> str:
    """Render the table of verdicts, whose cells are below one another on a phone; empty without rows."""
    head = "".join(f"<th>{name}</th>" for name in VERDICTS[: 3 + has_documents])
    return f'<div class="scroll"><table class="grid stack"><tr>{head}</tr>{rows}</table></div>' if rows else ""


def _dots(results: StudyResults) -> str:
    """Plot one row per arm: its runs as dots, their mean as a bar."""
    if not any(arm.summary.n for arm in results.arms):
        return "<p>No run finished.</p>"
    rows = [
        Row(
            f"{arm.arm.name}, {arm.steps:,} steps" + (" (time)" if arm.budget == TIME else ""),
            [
                (found, f"seed {seed}: {fixed(found, results.decimals)}")
                for seed, found in arm.losses.items()
                if found is not None
            ],
            mean=arm.summary.mean,
            text="" if arm.summary.mean is None else fixed(arm.summary.mean, results.decimals),
        )
        for arm in results.arms
    ]
    return row_plot("validation loss of every run", "validation loss, nats per token (← better)", rows)


def _errors(results: StudyResults) -> list[tuple[str, list[str]]]:
    """Return rows with the error between seeds and between documents of each arm."""
    rows = []
    for arm in results.arms:
        mean = "" if arm.summary.mean is None else fixed(arm.summary.mean, results.decimals)
        errors = (arm.summary.sd, arm.document_error)
        cells = [mean, *("" if error is None else significant(error) for error in errors)]
        rows.append(("", [f"{escape(arm.arm.name)}, {arm.steps:,} steps", *cells]))
    return rows


def _intervals(contrasts: list[Contrast]) -> str:
    """Plot one row per comparison: the mean difference with its interval."""
    rows = []
    for contrast in contrasts:
        found = contrast.difference
        if found.mean is None:
            continue
        span = (found.low, found.high) if found.low is not None and found.high is not None else None
        text = "+" * (found.mean > 0) + significant(found.mean)
        rows.append(Row(f"{contrast.title} ({contrast.budget})", [(found.mean, text)], span, text=text))
    if not rows:
        return "<p>No pair of runs finished.</p>"
    axis = "difference of the losses, nats per token: below 0 the first is better, above 0 the second"
    return row_plot("difference of every comparison, with its interval", axis, rows, zero=True)


def _rates(results: StudyResults) -> list[tuple[str, list[str]]]:
    return [
        (
            "",
            [
                escape(rates.arm),
                f"{rate:.3g}{', chosen' * (rate == rates.chosen)}",
                "failed" if loss is None else fixed(loss, rates.decimals),
            ],
        )
        for rates in results.learning_rates
        for rate, loss in rates.losses.items()
    ]
