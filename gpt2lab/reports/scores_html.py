"""Page of scores: one panel per metric with a dot and an interval for each model."""

from dataclasses import dataclass
from html import escape

from gpt2lab.reports.number_format import significant
from gpt2lab.reports.page import render_page, section
from gpt2lab.reports.row_plot import Row, row_plot


@dataclass(frozen=True)
class Bar:
    """A model's value of one metric with the ends of its interval."""

    name: str
    value: float
    low: float
    high: float


def render(title: str, panels: dict[tuple[str, str], list[Bar]]) -> str:
    """Render the page.

    Args:
        panels: (name of a metric, meaning) → its values by model.
    """
    body = "".join(section(name, _panel(meaning, bars)) for (name, meaning), bars in panels.items() if bars)
    status = f"{escape(title)}<br>Dots: the score; bars: its 95 % interval"
    return render_page(title, "Scores", status, body)


def _panel(meaning: str, bars: list[Bar]) -> str:
    rows = [
        Row(
            bar.name,
            [(bar.value, f"{bar.name}: {bar.value:.4f} ({bar.low:.4f} … {bar.high:.4f})")],
            (bar.low, bar.high),
            text=f"{significant(bar.value)} ({significant(bar.low)} … {significant(bar.high)})",
        )
        for bar in bars
    ]
    return row_plot(meaning, meaning, rows)
