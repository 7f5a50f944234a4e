"""Page of scores: one panel per metric with a dot and an interval for each model."""

from dataclasses import dataclass
from html import escape

from gpt2lab.reports.report_html import STYLE
from gpt2lab.reports.svg_rows import OWN_STYLE, RowPlot

SHOWN_LETTERS = 30  # of a model's name


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
    parts = [f"<h2>{escape(name)}</h2>{_panel(meaning, bars)}" for (name, meaning), bars in panels.items() if bars]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}{OWN_STYLE}</style></head><body>
<h1>Scores</h1><p class="status">{escape(title)}<br>Dots: the score; bars: its 95 % interval</p>
{"".join(parts)}
</body></html>
"""


def _panel(meaning: str, bars: list[Bar]) -> str:
    ends = [end for bar in bars for end in (bar.low, bar.high)]
    plot = RowPlot(ends, [_shorten(bar.name) for bar in bars], meaning)
    for row, bar in enumerate(bars):
        y = plot.y(row)
        x = f'x1="{plot.x(bar.low)}" x2="{plot.x(bar.high)}"'
        title = f"<title>{escape(bar.name)}: {bar.value:.4f} ({bar.low:.4f} … {bar.high:.4f})</title>"
        plot.parts.append(f'<line class="interval" {x} y1="{y}" y2="{y}"/>')
        plot.parts.append(f'<circle class="val" cx="{plot.x(bar.value)}" cy="{y}" r="5">{title}</circle>')
    return plot.svg(meaning)


def _shorten(name: str) -> str:
    return name if len(name) <= SHOWN_LETTERS else "…" + name[1 - SHOWN_LETTERS :]
