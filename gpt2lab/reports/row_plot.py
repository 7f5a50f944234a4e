"""Row plot: labelled rows over one numeric axis, in HTML, with dots, intervals and the number of each row as text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from gpt2lab.number_format import significant

MARGIN = 0.04  # share of the range left free at both ends
TICKS = 4
EDGE = 4  # percent of the axis


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        dots: (value, tooltip).
        span: ends of an interval.
        mean: value marked by a bar.
        text: shown at the right.
        attributes: further HTML attributes, escaped.
    """

    label: str
    dots: Sequence[tuple[float, str]] = ()
    span: tuple[float, float] | None = None
    mean: float | None = None
    text: str = ""
    attributes: str = 'class="row"'


def row_plot(label: str, axis: str, rows: Sequence[Row], zero: bool = False, ends: Sequence[float] = ()) -> str:
    """Render the plot.

    Args:
        label: accessible name.
        axis: what the axis measures, and which direction is better.
        zero: whether the axis includes 0, as a dashed line.
        ends: range of the axis; values outside are at its edge. Empty: all dots and intervals.
    """
    values = [value for row in rows for value in [*(value for value, _ in row.dots), *(row.span or ())]]
    low, high = (min(ends or values), max(ends or values)) if ends or values else (0.0, 1.0)
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    margin = MARGIN * (high - low) or abs(high) * MARGIN or 1.0
    low, high = low - margin, high + margin

    def at(value: float) -> float:
        return round(100 * (min(max(value, low), high) - low) / (high - low), 2)

    parts = []
    for row in rows:
        marks = [f'<i class="zero" style="left:{at(0)}%"></i>'] * zero
        if row.span:
            left, right = at(row.span[0]), at(row.span[1])
            marks.append(f'<i class="span" style="left:{left}%;width:{round(right - left, 2)}%"></i>')
        for value, tooltip in row.dots:
            marks.append(f'<i class="dot" style="left:{at(value)}%" title="{escape(tooltip)}"></i>')
        if row.mean is not None:
            marks.append(f'<i class="mean" style="left:{at(row.mean)}%"></i>')
        parts.append(
            f"<div {row.attributes}><span>{escape(row.label)}</span>"
            f'<span class="track">{"".join(marks)}</span><span class="value">{escape(row.text)}</span></div>'
        )
    ticks = "".join(
        f'<i class="tick{_edge(at(tick))}" style="left:{at(tick)}%">{significant(tick)}</i>'
        for tick in round_ticks(low, high)
    )
    scale = f'<div class="row axis"><span></span><span class="track">{ticks}</span><span></span></div>'
    return (
        f'<div class="rows" role="img" aria-label="{escape(label)}">{"".join(parts)}{scale}'
        f'<div class="row axis"><span></span><span>{escape(axis)}</span><span></span></div></div>'
    )


def _edge(percent: float) -> str:
    """Return the CSS class that keeps a label within the axis."""
    return " low" if percent < EDGE else " high" if percent > 100 - EDGE else ""


def share_bars(label: str, rows: Sequence[tuple[str, float, str, bool]]) -> str:
    """Render a bar from 0 to 100 % for each (label, share, text, whether it is pale)."""
    parts = [
        f'<div class="row{" chance" * is_pale}"><span>{escape(name)}</span><span class="track">'
        f'<i class="share" style="left:0;width:{round(100 * max(share, 0.0), 2)}%"></i></span>'
        f'<span class="value">{escape(text)}</span></div>'
        for name, share, text, is_pale in rows
    ]
    return f'<div class="rows" role="img" aria-label="{escape(label)}">{"".join(parts)}</div>'


def round_ticks(low: float, high: float) -> list[float]:
    """Return a few round numbers within [low, high]."""
    rough = (high - low) / TICKS
    magnitude = 10 ** math.floor(math.log10(rough))
    step = magnitude * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
    return [round(number * step, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
