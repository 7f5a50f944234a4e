"""Charts of the pages of results, as JSON that charts.js draws with uPlot.

    curves     lines over optimizer steps, tokens or seconds
    parallel   one vertical axis per key and one for the result, a line per setting
    slices     a dot per setting, over the values of one key

Lines of a setting carry its number, by which the page highlights it in all charts and tables at once.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

Points = Sequence[tuple[float, float]]
STEPS = "optimizer steps"


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        colour: name of a colour in page.css: train, val, teacher, baseline, tie, soft.
        is_smoothed: whether the page's smoothing applies.
        setting: number of its setting; None outside sweeps.
        clock: index of its run's clock, for the axes of tokens and seconds.
    """

    name: str
    points: Points
    colour: str = "train"
    is_smoothed: bool = False
    is_dashed: bool = False
    is_bold: bool = False
    setting: int | None = None
    clock: int = 0


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        levels: horizontal lines: (name, value, colour).
        events: vertical lines: (step, text).
        x_ticks: (position, text) instead of numbers.
        axes: of parallel coordinates: (name, [(position from 0 to 1, text)]).
        y_range: shown range before zooming; None: all values.
        names_nearest: the line nearest to the pointer is named instead of a legend with all lines.
    """

    title: str
    lines: Sequence[Line]
    kind: str = "curves"
    levels: Sequence[tuple[str, float, str]] = ()
    events: Sequence[tuple[float, str]] = ()
    x_ticks: Sequence[tuple[float, str]] = ()
    axes: Sequence[tuple[str, Sequence[tuple[float, str]]]] = ()
    y_range: tuple[float, float] | None = None
    is_wide: bool = False
    names_nearest: bool = False

    def html(self) -> str:
        """Render the element that charts.js fills; empty without a finite value."""
        content = asdict(self)
        for line in content["lines"]:
            line["points"] = [(x, y) for x, y in line["points"] if math.isfinite(y)]
        if not any(line["points"] for line in content["lines"]):
            return ""
        wide = " wide" if self.is_wide else ""
        return (
            f'<figure class="plot{wide}" role="img" aria-label="{escape(self.title)}">'
            f"<figcaption>{escape(self.title)}</figcaption>"
            f'<script type="application/json">{embedded_json(content)}</script></figure>'
        )


def plots(charts: Sequence[Chart]) -> str:
    """Render a grid of charts; empty if none has a value."""
    parts = [chart.html() for chart in charts]
    return f'<div class="plots">{"".join(parts)}</div>' if any(parts) else ""


def tools(clocks: Sequence[Mapping[str, Sequence[float]]], has_smoothing: bool) -> str:
    """Render the controls of all curves of a page: x axis, logarithmic axes, smoothing.

    Args:
        clocks: of each run the lists `steps`, `tokens` and `seconds`; those that every run has can be chosen.
    """
    names = ["steps", *(name for name in ("tokens", "seconds") if all(clock.get(name) for clock in clocks))]
    options = "".join(f'<option value="{name}">{STEPS if name == "steps" else name}</option>' for name in names)
    smoothing = '<label>smoothing <input type="range" id="smoothing" min="0" max="0.98" step="0.02" value="0"></label>'
    return (
        f'<div class="tools"><label>x axis <select id="x-axis">{options}</select></label>'
        '<label><input type="checkbox" id="log-x"> log x</label><label><input type="checkbox" id="log-y"> log y</label>'
        f"{smoothing if has_smoothing else ''}<span>Drag (or pinch) to zoom, double-click to reset.</span></div>"
        f'<script type="application/json" id="clocks">{embedded_json(clocks)}</script>'
    )


def embedded_json(content: Any) -> str:
    """Return JSON that cannot end the script element around it; numbers with seven digits."""
    return json.dumps(_rounded(content), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _rounded(content: Any) -> Any:
    if isinstance(content, float):
        return float(f"{content:.7g}") if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    return [_rounded(value) for value in content] if isinstance(content, list | tuple) else content
