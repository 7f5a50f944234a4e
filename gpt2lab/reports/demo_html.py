"""demo.html: all runs of the demo on one page, with their curves and samples side by side, while they train."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from gpt2lab.analysis.sweep_runs import SweepResults
from gpt2lab.reports.comparison_html import Rows, curves
from gpt2lab.reports.page import command, render_page, section

RELOAD_SECONDS = 15
WORDS = ("stage", "state", "model", "summary")  # columns without numbers


@dataclass(frozen=True)
class DemoContent:
    """Content of the page.

    Attributes:
        stages: one row of figures per stage, equal keys; `stage` and `state` among them.
        links: stage → path of its report.html.
        notes: sentences below the table.
        scores: rows of the table of summaries, the head first.
        results: runs that have begun; `rows` are their metrics.csv.
        samples: prompt → stage → text.
        commands: title → command.
        is_over: whether no stage is running or waiting.
    """

    stages: Sequence[Mapping[str, str]]
    links: Mapping[str, str]
    notes: Sequence[str]
    scores: Sequence[Sequence[str]]
    results: SweepResults
    rows: Sequence[Rows]
    samples: Mapping[str, Mapping[str, str]]
    commands: Mapping[str, str] = field(default_factory=dict)
    is_over: bool = False


def render(title: str, status: str, content: DemoContent) -> str:
    """Render the page; it reloads itself until the demo is over."""
    body = [
        section("Stages", f"{_stages(content)}<p>{'<br>'.join(map(escape, content.notes))}</p>"),
        section("Summaries of Python functions", _grid(content.scores)),
        section("Curves", curves(content.results, content.rows) if content.rows else ""),
        section("Samples side by side", _samples(content.samples)),
        section(
            "Next", "".join(f"<div>{escape(name)}</div>{command(text)}" for name, text in content.commands.items())
        ),
    ]
    return render_page(title, title, escape(status), "".join(body), 0 if content.is_over else RELOAD_SECONDS)


def _stages(content: DemoContent) -> str:
    head = list(content.stages[0])
    rows = [[_linked(row["stage"], content.links), *(escape(row[name]) for name in head[1:])] for row in content.stages]
    return _table(head, rows)


def _linked(name: str, links: Mapping[str, str]) -> str:
    return f'<a href="{escape(links[name])}">{escape(name)}</a>' if name in links else escape(name)


def _grid(rows: Sequence[Sequence[str]]) -> str:
    return _table(rows[0], [[escape(cell) for cell in row] for row in rows[1:]]) if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render a table whose cells are HTML, numbers to the right."""
    kinds = ["" if name in WORDS else ' class="number"' for name in head]
    names = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(head, kinds, strict=True))
    lines = "".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="grid"><tr>{names}</tr>{lines}</table></div>'


def _samples(samples: Mapping[str, Mapping[str, str]]) -> str:
    """Render the continuations of each prompt, a column per model."""
    return "".join(
        f"<h3>Prompt</h3><pre>{escape(prompt)}</pre>"
        '<div class="texts three">'
        + "".join(f"<div><small>{escape(name)}</small><pre>{escape(text)}</pre></div>" for name, text in texts.items())
        + "</div>"
        for prompt, texts in samples.items()
    )
