"""Sweep plots: settings with their intervals, learning curves, parallel coordinates and importances, as inline SVG.

What belongs to a setting carries its number as `data-s`, by which the page finds it in all plots at once.
"""

import math
from collections.abc import Sequence
from html import escape

from gpt2lab import metric_names
from gpt2lab.analysis.hyperparameter_importance import Importance
from gpt2lab.analysis.sweep_axes import VariedKey
from gpt2lab.analysis.sweep_runs import Contest, Setting
from gpt2lab.reports.report_html import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, step_axes, ticks
from gpt2lab.reports.svg_rows import ROW, RowPlot

SHOWN_ROWS = 40  # settings in the plot of means
SHOWN_LETTERS = 36  # of a setting's name
CURVE_POINTS = 100
FAR = 2.0  # settings further from the best than so many times the one at three quarters stand at the edge
BEGINNING = 0.2  # of a run, whose losses need no room
PLACES = 6  # of numbers that are written beside an axis of parallel coordinates
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


def rank(contest: Contest, setting: Setting) -> str:
    """The class of what is drawn for a setting: best, tie, or nothing."""
    standing = contest.standing(setting)
    return "tie" if standing == "tie" else "best" if standing else ""


def limits(contest: Contest) -> tuple[float, float]:
    """Best and worst value that is drawn where it lies: what is far off must not press the rest together."""
    values = [value for setting in contest.settings for _, value in setting.values]
    sign = 1.0 if metric_names.lower_is_better(contest.metric) else -1.0
    best, worst = min(sign * value for value in values), max(sign * value for value in values)
    means = sorted(sign * setting.mean[0] for setting in contest.settings if setting.mean is not None)
    reach = FAR * (means[math.ceil(0.75 * (len(means) - 1))] - best)
    return sign * best, sign * (min(worst, best + reach) if reach > 0 else worst)


def means_plot(contest: Contest, numbers: dict[str, int]) -> str:
    """One row for each setting: its runs as dots, their mean and its interval."""
    shown = contest.settings[:SHOWN_ROWS]
    low, high = sorted(limits(contest))
    room = (high - low or abs(high) or 1.0) * 0.5  # an interval from two runs can be wider than all that is to be seen
    ends = [min(max(end, low - room), high + room) for setting in shown for end in _interval(setting)]
    plot = RowPlot([low, high, *ends], [shortened(setting.name) for setting in shown], contest.metric)
    left, right = plot.ticks[0], plot.ticks[-1]

    def x(value: float) -> float:
        return plot.x(min(max(value, left), right))

    for row, setting in enumerate(shown):
        y = plot.y(row)
        plot.parts.append(f'<g data-s="{numbers[setting.name]}" class="{rank(contest, setting)}">')
        if interval := _interval(setting):
            plot.parts.append(f'<line class="span" x1="{x(interval[0])}" x2="{x(interval[1])}" y1="{y}" y2="{y}"/>')
        for seed, value in setting.values:
            title = f"<title>{escape(f'seed {seed}: ' * bool(seed))}{value:.4f}</title>"
            plot.parts.append(_dot(plot, value, y, title))
        if setting.mean is not None and len(setting.values) > 1 and left <= setting.mean[0] <= right:
            at = x(setting.mean[0])
            plot.parts.append(f'<line class="bar" x1="{at}" x2="{at}" y1="{y - 9}" y2="{y + 9}"/>')
        plot.parts.append("</g>")
    left_out = len(contest.settings) - len(shown)
    return plot.svg("every setting's runs, their mean and interval") + (
        f"<p>{left_out} worse settings are not drawn.</p>" if left_out else ""
    )


def behind_plot(contest: Contest, numbers: dict[str, int]) -> str:
    """How much worse than the best each setting is; where the bar around it reaches 0, the two tie."""
    behind = contest.comparison.behind
    shown = [setting for setting in contest.settings if setting.name in behind][:SHOWN_ROWS]
    best, worst = limits(contest)
    reach = abs(worst - best)
    ends = [min(max(end, -reach), reach) for setting in shown for end in _ends(behind[setting.name])]
    plot = RowPlot(
        [0.0, *ends], [shortened(setting.name) for setting in shown], f"{contest.metric}, worse than the best"
    )
    right = plot.ticks[-1]
    zero = plot.x(0.0)
    for row, setting in enumerate(shown):
        y, (low, high) = plot.y(row), _ends(behind[setting.name])
        plot.parts.append(f'<g data-s="{numbers[setting.name]}" class="{rank(contest, setting)}">')
        x1, x2 = (plot.x(min(max(end, plot.ticks[0]), right)) for end in (low, high))
        plot.parts.append(f'<line class="span" x1="{x1}" x2="{x2}" y1="{y}" y2="{y}"/>')
        title = f"<title>{(low + high) / 2:.4f}</title>"
        plot.parts.append(_dot(plot, (low + high) / 2, y, title) + "</g>")
    plot.parts.append(f'<line class="zero" x1="{zero}" x2="{zero}" y1="0" y2="{ROW * len(shown)}"/>')
    return plot.svg("how much worse than the best each setting is")


def curves_plot(contest: Contest, settings: Sequence[Setting], numbers: dict[str, int]) -> str:
    """The metric over steps, a line for each run; nothing where no run has two points.

    Args:
        settings: all of the sweep; what was pruned or failed before it had a value is drawn too, dashed.
    """
    shown = [*contest.settings, *(setting for setting in settings if not setting.values)]
    runs = [(setting, run) for setting in reversed(shown) for run in setting.runs if run.metric == contest.metric]
    points = [point for _, run in runs for point in run.curve]
    last = max((step for step, _ in points), default=0)
    if not any(len(run.curve) > 1 for _, run in runs):
        return ""
    far = sorted(limits(contest))
    late = [value for step, value in points if step >= BEGINNING * last and math.isfinite(value)]
    is_lower = metric_names.lower_is_better(contest.metric)
    kept = [value for value in late if (value <= far[1] if is_lower else value >= far[0])]
    x_ticks, y_ticks = ticks(0, last, 8), ticks(min([far[0], *kept]), max([far[1], *kept]), 6)

    def x(step: float) -> float:
        return round(LEFT + step / x_ticks[-1] * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(contest.metric)} over steps">']
    parts += step_axes([(x(tick), tick) for tick in x_ticks], [(y(tick), tick) for tick in y_ticks])
    inside = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
    parts.append(f'<clipPath id="inside"><rect {inside}/></clipPath><g clip-path="url(#inside)">')
    for setting, run in runs:  # the best comes last, on top
        line = " ".join(f"{x(step)},{y(value)}" for step, value in _thinned(run.curve) if math.isfinite(value))
        title = f"<title>{escape(f'{run.number}: {setting.name}')}</title>"
        kind = rank(contest, setting) + " unfinished" * (run.value is None)
        parts.append(
            f'<path data-s="{numbers[setting.name]}" class="{kind}" d="M{line}">{title}</path>' if line else ""
        )
    return "".join([*parts, "</g></svg>"])


def parallel_plot(contest: Contest, keys: Sequence[str], numbers: dict[str, int]) -> str:
    """An axis for each key and one for the metric, its good end on top; a line for each setting."""
    low, high = sorted(limits(contest))
    best_first = metric_names.lower_is_better(contest.metric)
    axes = [VariedKey([setting.told.get(key, "") for setting in contest.settings]) for key in keys]
    lefts = [80 + number * (WIDTH - 190) / max(len(keys), 1) for number in range(len(keys) + 1)]

    def y(place: float) -> float:
        return round(HEIGHT - 44 - place * (HEIGHT - 64), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="settings as lines over their keys">']
    for column, (left, name) in enumerate(zip(lefts, [*keys, contest.metric], strict=True)):
        parts.append(f'<line class="axis" x1="{left}" x2="{left}" y1="{y(1)}" y2="{y(0)}"/>')
        parts.append(f'<text x="{left}" y="{y(0) + 18 + 14 * (column % 2)}" text-anchor="middle">{escape(name)}</text>')
    for number in reversed(range(len(contest.settings))):
        setting = contest.settings[number]
        assert setting.mean is not None
        share = (min(max(setting.mean[0], low), high) - low) / (high - low) if high > low else 0.5
        places = [*(axis.places[number] for axis in axes), 1 - share if best_first else share]
        line = " ".join(f"{left:.1f},{y(place)}" for left, place in zip(lefts, places, strict=True))
        own = f'data-s="{numbers[setting.name]}" class="{rank(contest, setting)}"'
        parts.append(f'<path {own} d="M{line}"><title>{escape(setting.name)}: {setting.mean[0]:.4f}</title></path>')
    for left, axis in zip(lefts, axes, strict=False):
        for word, place in _written(axis):
            parts.append(f'<text x="{left - 7}" y="{y(place) + 4}" text-anchor="end" class="value">{word}</text>')
    for value, place in ((low, 1.0 if best_first else 0.0), (high, 0.0 if best_first else 1.0)):
        parts.append(f'<text x="{lefts[-1] + 8}" y="{y(place) + 4}" class="value">{value:.4g}</text>')
    return "".join([*parts, "</svg>"])


def importance_bars(found: Sequence[Importance]) -> str:
    """A bar for each key, from 0 to 100 %; pale where chance would do as much."""
    plot = RowPlot([0.0, 1.0], [one.key for one in found], "share of the differences between settings")
    for row, one in enumerate(found):
        left, width = plot.x(0.0), round(plot.x(one.share) - plot.x(0.0), 1)
        chance = "" if one.is_shown else " chance"
        plot.parts.append(f'<rect class="share{chance}" x="{left}" y="{plot.y(row) - 8}" width="{width}" height="16"/>')
        says = f"{one.share:.0%}".replace("%", " %") + (" (no more than chance)" if chance else "")
        end = (
            f'x="{left + width - 8}" text-anchor="end" class="inside"' if one.share > 0.5 else f'x="{left + width + 8}"'
        )
        plot.parts.append(f'<text {end} y="{plot.y(row) + 4}">{says}</text>')
    return plot.svg("how much each key explains")


def shortened(name: str) -> str:
    """A setting's name that fits beside a row."""
    return name if len(name) <= SHOWN_LETTERS else name[: SHOWN_LETTERS - 1] + "…"


def _dot(plot: RowPlot, value: float, y: float, title: str) -> str:
    """A dot, or at the edge of the plot an arrow that points to where the value lies."""
    if plot.ticks[0] <= value <= plot.ticks[-1]:
        return f'<circle class="dot" cx="{plot.x(value)}" cy="{y}" r="5">{title}</circle>'
    edge, tip = (plot.x(plot.ticks[-1]), 8) if value > plot.ticks[-1] else (plot.x(plot.ticks[0]), -8)
    points = f"{edge},{y} {edge - tip},{y - 5} {edge - tip},{y + 5}"
    return f'<polygon class="dot" points="{points}">{title}</polygon>'


def _ends(found: tuple[float, float]) -> tuple[float, float]:
    middle, half = found
    return middle - half, middle + half


def _interval(setting: Setting) -> tuple[float, ...]:
    """Both ends; nothing for one run."""
    if setting.mean is None or math.isnan(setting.mean[1]):
        return ()
    mean, half = setting.mean
    return mean - half, mean + half


def _thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    every = math.ceil(len(curve) / CURVE_POINTS)
    return curve if every < 2 else [*curve[:-1:every], curve[-1]]


def _written(axis: VariedKey) -> list[tuple[str, float]]:
    """The values that stand beside an axis: all, or the ends where there are many."""
    places = dict(sorted(dict(zip(axis.values, axis.places, strict=True)).items(), key=lambda one: one[1]))
    pairs = list(places.items())
    if len(pairs) > PLACES and axis.is_number:
        pairs = [pairs[0], *(pair for pair in pairs[1:2] if not pairs[0][0]), pairs[-1]]
    return [(escape(value[:14]) if value else "–", place) for value, place in pairs]
