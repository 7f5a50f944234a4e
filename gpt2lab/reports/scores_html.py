"""Page of scores: one panel per metric with a dot and an interval for each model."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from gpt2lab.number_format import significant
from gpt2lab.reports.page import render_page, section
from gpt2lab.reports.row_plot import Row, row_plot


@dataclass(frozen=True)
class Bar:
    """A model's value of one metric with the ends of its interval."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """One metric of all models; `direction` is which one is better, if any is."""

    name: str
    meaning: str
    direction: str
    bars: Sequence[Bar]


def render(title: str, panels: Sequence[Panel]) -> str:
    """Render the page."""
    body = "".join(section(panel.name, _rows(panel)) for panel in panels if panel.bars)
    status = f"{escape(title)}<br>Dots: the score; bars: its 95 % interval"
    return render_page(title, "Scores", status, body)


def _rows(panel: Panel) -> str:
    rows = [
        Row(
            bar.name,
            [(bar.value, f"{bar.name}: {bar.value:.4f} ({bar.low:.4f} … {bar.high:.4f})")],
            (bar.low, bar.high),
            text=f"{significant(bar.value)} ({significant(bar.low)} … {significant(bar.high)})",
        )
        for bar in panel.bars
    ]
    return row_plot(panel.meaning, panel.meaning + f" ({panel.direction})" * bool(panel.direction), rows)
