"""Sweep plots: settings with their intervals, learning curves, parallel coordinates and importances, as inline SVG.

Elements of a setting have its number as `data-s`, by which the page highlights it in all plots at once.
"""

import math
from collections.abc import Sequence
from html import escape

from gpt2lab import metric_names
from gpt2lab.analysis.hyperparameter_importance import Importance
from gpt2lab.analysis.sweep_axes import VariedKey
from gpt2lab.analysis.sweep_runs import Setting, SettingGroup
from gpt2lab.reports.report_html import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, step_axes, ticks
from gpt2lab.reports.svg_rows import ROW, RowPlot

SHOWN_ROWS = 40  # settings in the plot of means
SHOWN_LETTERS = 36  # of a setting's name
CURVE_POINTS = 100
FAR = 2.0  # outliers: gap to the best above so many times that of the third quartile; drawn at the edge
BEGINNING = 0.2  # share of a run whose losses do not affect the axis
MAX_LABELS = 6  # numbers beside an axis of parallel coordinates
SETTINGS_STYLE = """
[data-s] { transition: opacity .15s; } .hot [data-s]:not(.on) { opacity: .12; } tr[data-s] { opacity: 1 !important; }
tr.on td { background: var(--panel); }
.dot { fill: var(--train); fill-opacity: .55; } .best .dot { fill: var(--val); } .tie .dot { fill: var(--tie); }
.span { stroke: var(--train); stroke-width: 2; } .best .span { stroke: var(--val); } .tie .span { stroke: var(--tie); }
.bar { stroke: var(--train); stroke-width: 4; } .best .bar { stroke: var(--val); } .tie .bar { stroke: var(--tie); }
path { fill: none; stroke: var(--train); stroke-width: 1.5; stroke-opacity: .6; }
.best path, path.best { stroke: var(--val); stroke-width: 2.5; stroke-opacity: 1; }
.tie path, path.tie { stroke: var(--tie); stroke-opacity: .9; }
path.unfinished { stroke-dasharray: 4 4; }
.axis { stroke: var(--soft); } .share { fill: var(--train); } .share.chance { fill: var(--line); }
svg .inside { fill: var(--paper); }
"""


def rank(group: SettingGroup, setting: Setting) -> str:
    """Return the CSS class of a setting: best, tie, or ""."""
    standing = group.status_of(setting)
    return "tie" if standing == "tie" else "best" if standing else ""


def limits(group: SettingGroup) -> tuple[float, float]:
    """Return the (best, worst) value in range; outliers are drawn at the edge."""
    values = [value for setting in group.settings for _, value in setting.values]
    sign = 1.0 if metric_names.lower_is_better(group.metric) else -1.0
    best, worst = min(sign * value for value in values), max(sign * value for value in values)
    means = sorted(sign * setting.mean[0] for setting in group.settings if setting.mean is not None)
    reach = FAR * (means[math.ceil(0.75 * (len(means) - 1))] - best)
    return sign * best, sign * (min(worst, best + reach) if reach > 0 else worst)


def means_plot(group: SettingGroup, numbers: dict[str, int]) -> str:
    """Plot one row per setting: its runs as dots, their mean and its interval."""
    shown = group.settings[:SHOWN_ROWS]
    low, high = sorted(limits(group))
    margin = (high - low or abs(high) or 1.0) * 0.5  # an interval from two runs can be wider than the range of values
    ends = [min(max(end, low - margin), high + margin) for setting in shown for end in _interval(setting)]
    plot = RowPlot([low, high, *ends], [shorten(setting.name) for setting in shown], group.metric)
    left, right = plot.ticks[0], plot.ticks[-1]

    def x(value: float) -> float:
        return plot.x(min(max(value, left), right))

    for row, setting in enumerate(shown):
        y = plot.y(row)
        plot.parts.append(f'<g data-s="{numbers[setting.name]}" class="{rank(group, setting)}">')
        if interval := _interval(setting):
            plot.parts.append(f'<line class="span" x1="{x(interval[0])}" x2="{x(interval[1])}" y1="{y}" y2="{y}"/>')
        for seed, value in setting.values:
            title = f"<title>{escape(f'seed {seed}: ' * bool(seed))}{value:.4f}</title>"
            plot.parts.append(_dot(plot, value, y, title))
        if setting.mean is not None and len(setting.values) > 1 and left <= setting.mean[0] <= right:
            at = x(setting.mean[0])
            plot.parts.append(f'<line class="bar" x1="{at}" x2="{at}" y1="{y - 9}" y2="{y + 9}"/>')
        plot.parts.append("</g>")
    left_out = len(group.settings) - len(shown)
    return plot.svg("every setting's runs, their mean and interval") + (
        f"<p>{left_out} worse settings are not drawn.</p>" if left_out else ""
    )


def gap_plot(group: SettingGroup, numbers: dict[str, int]) -> str:
    """Plot the gap of each setting to the best; if its bar includes 0, the two tie."""
    gaps = group.comparison.gaps
    shown = [setting for setting in group.settings if setting.name in gaps][:SHOWN_ROWS]
    best, worst = limits(group)
    reach = abs(worst - best)
    ends = [min(max(end, -reach), reach) for setting in shown for end in _ends(gaps[setting.name])]
    plot = RowPlot([0.0, *ends], [shorten(setting.name) for setting in shown], f"{group.metric}, worse than the best")
    right = plot.ticks[-1]
    zero = plot.x(0.0)
    for row, setting in enumerate(shown):
        y, (low, high) = plot.y(row), _ends(gaps[setting.name])
        plot.parts.append(f'<g data-s="{numbers[setting.name]}" class="{rank(group, setting)}">')
        x1, x2 = (plot.x(min(max(end, plot.ticks[0]), right)) for end in (low, high))
        plot.parts.append(f'<line class="span" x1="{x1}" x2="{x2}" y1="{y}" y2="{y}"/>')
        title = f"<title>{(low + high) / 2:.4f}</title>"
        plot.parts.append(_dot(plot, (low + high) / 2, y, title) + "</g>")
    plot.parts.append(f'<line class="zero" x1="{zero}" x2="{zero}" y1="0" y2="{ROW * len(shown)}"/>')
    return plot.svg("how much worse than the best each setting is")


def curves_plot(group: SettingGroup, settings: Sequence[Setting], numbers: dict[str, int]) -> str:
    """Plot the metric over steps, a line per run; empty if no run has two points.

    Args:
        settings: all settings of the sweep; runs without a final value are dashed.
    """
    shown = [*group.settings, *(setting for setting in settings if not setting.values)]
    runs = [(setting, run) for setting in reversed(shown) for run in setting.runs if run.metric == group.metric]
    points = [point for _, run in runs for point in run.curve]
    last = max((step for step, _ in points), default=0)
    if not any(len(run.curve) > 1 for _, run in runs):
        return ""
    far = sorted(limits(group))
    late = [value for step, value in points if step >= BEGINNING * last and math.isfinite(value)]
    is_lower = metric_names.lower_is_better(group.metric)
    kept = [value for value in late if (value <= far[1] if is_lower else value >= far[0])]
    x_ticks, y_ticks = ticks(0, last, 8), ticks(min([far[0], *kept]), max([far[1], *kept]), 6)

    def x(step: float) -> float:
        return round(LEFT + step / x_ticks[-1] * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(group.metric)} over steps">']
    parts += step_axes([(x(tick), tick) for tick in x_ticks], [(y(tick), tick) for tick in y_ticks])
    inside = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
    parts.append(f'<clipPath id="inside"><rect {inside}/></clipPath><g clip-path="url(#inside)">')
    for setting, run in runs:  # the best comes last, on top
        line = " ".join(f"{x(step)},{y(value)}" for step, value in _thin(run.curve) if math.isfinite(value))
        title = f"<title>{escape(f'{run.number}: {setting.name}')}</title>"
        kind = rank(group, setting) + " unfinished" * (run.value is None)
        parts.append(
            f'<path data-s="{numbers[setting.name]}" class="{kind}" d="M{line}">{title}</path>' if line else ""
        )
    return "".join([*parts, "</g></svg>"])


def parallel_plot(group: SettingGroup, keys: Sequence[str], numbers: dict[str, int]) -> str:
    """Plot an axis per key and one for the metric (better on top), with a line per setting."""
    low, high = sorted(limits(group))
    best_first = metric_names.lower_is_better(group.metric)
    axes = [VariedKey([setting.overrides.get(key, "") for setting in group.settings]) for key in keys]
    lefts = [80 + number * (WIDTH - 190) / max(len(keys), 1) for number in range(len(keys) + 1)]

    def y(position: float) -> float:
        return round(HEIGHT - 44 - position * (HEIGHT - 64), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="settings as lines over their keys">']
    for column, (left, name) in enumerate(zip(lefts, [*keys, group.metric], strict=True)):
        parts.append(f'<line class="axis" x1="{left}" x2="{left}" y1="{y(1)}" y2="{y(0)}"/>')
        parts.append(f'<text x="{left}" y="{y(0) + 18 + 14 * (column % 2)}" text-anchor="middle">{escape(name)}</text>')
    for number in reversed(range(len(group.settings))):
        setting = group.settings[number]
        assert setting.mean is not None
        share = (min(max(setting.mean[0], low), high) - low) / (high - low) if high > low else 0.5
        positions = [*(axis.positions[number] for axis in axes), 1 - share if best_first else share]
        line = " ".join(f"{left:.1f},{y(position)}" for left, position in zip(lefts, positions, strict=True))
        own = f'data-s="{numbers[setting.name]}" class="{rank(group, setting)}"'
        parts.append(f'<path {own} d="M{line}"><title>{escape(setting.name)}: {setting.mean[0]:.4f}</title></path>')
    for left, axis in zip(lefts, axes, strict=False):
        for word, position in _labels(axis):
            parts.append(f'<text x="{left - 7}" y="{y(position) + 4}" text-anchor="end" class="value">{word}</text>')
    for value, position in ((low, 1.0 if best_first else 0.0), (high, 0.0 if best_first else 1.0)):
        parts.append(f'<text x="{lefts[-1] + 8}" y="{y(position) + 4}" class="value">{value:.4g}</text>')
    return "".join([*parts, "</svg>"])


def importance_bars(found: Sequence[Importance]) -> str:
    """Plot a bar per key, from 0 to 100 %; pale if not significant."""
    plot = RowPlot([0.0, 1.0], [one.key for one in found], "share of the differences between settings")
    for row, one in enumerate(found):
        left, width = plot.x(0.0), round(plot.x(one.share) - plot.x(0.0), 1)
        chance = "" if one.is_significant else " chance"
        plot.parts.append(f'<rect class="share{chance}" x="{left}" y="{plot.y(row) - 8}" width="{width}" height="16"/>')
        label = f"{one.share:.0%}".replace("%", " %") + (" (not significant)" if chance else "")
        end = (
            f'x="{left + width - 8}" text-anchor="end" class="inside"' if one.share > 0.5 else f'x="{left + width + 8}"'
        )
        plot.parts.append(f'<text {end} y="{plot.y(row) + 4}">{label}</text>')
    return plot.svg("importance of each key")


def shorten(name: str) -> str:
    """Truncate a setting's name to fit beside a row."""
    return name if len(name) <= SHOWN_LETTERS else name[: SHOWN_LETTERS - 1] + "…"


def _dot(plot: RowPlot, value: float, y: float, title: str) -> str:
    """Draw a dot, or an arrow at the edge for a value outside the plot."""
    if plot.ticks[0] <= value <= plot.ticks[-1]:
        return f'<circle class="dot" cx="{plot.x(value)}" cy="{y}" r="5">{title}</circle>'
    edge, tip = (plot.x(plot.ticks[-1]), 8) if value > plot.ticks[-1] else (plot.x(plot.ticks[0]), -8)
    points = f"{edge},{y} {edge - tip},{y - 5} {edge - tip},{y + 5}"
    return f'<polygon class="dot" points="{points}">{title}</polygon>'


def _ends(found: tuple[float, float]) -> tuple[float, float]:
    middle, half = found
    return middle - half, middle + half


def _interval(setting: Setting) -> tuple[float, ...]:
    """Return both ends; empty for one run."""
    if setting.mean is None or math.isnan(setting.mean[1]):
        return ()
    mean, half = setting.mean
    return mean - half, mean + half


def _thin(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    every = math.ceil(len(curve) / CURVE_POINTS)
    return curve if every < 2 else [*curve[:-1:every], curve[-1]]


def _labels(axis: VariedKey) -> list[tuple[str, float]]:
    """Return the labels of an axis: all values, or only the ends if there are many."""
    positions = dict(sorted(dict(zip(axis.values, axis.positions, strict=True)).items(), key=lambda one: one[1]))
    pairs = list(positions.items())
    if len(pairs) > MAX_LABELS and axis.is_number:
        pairs = [pairs[0], *(pair for pair in pairs[1:2] if not pairs[0][0]), pairs[-1]]
    return [(escape(value[:14]) if value else "–", position) for value, position in pairs]
