"""Charts of a sweep or comparison: settings with their intervals, curves, parallel coordinates, slices, importances."""

import math
from collections.abc import Sequence

from gpt2lab import metric_names
from gpt2lab.analysis.hyperparameter_importance import Importance, importances
from gpt2lab.analysis.sweep_axes import VariedKey, short_names, tick_text
from gpt2lab.analysis.sweep_runs import Setting, SettingGroup, format_value
from gpt2lab.number_format import fixed, significant
from gpt2lab.reports.charts import Chart, Line
from gpt2lab.reports.row_plot import Row, row_plot, share_bars
from gpt2lab.reports.run_curves import thinned

SHOWN_ROWS = 40  # settings in the plot of means
CURVE_POINTS = 100
FAR = 5.0  # outliers: gap to the best above so many times that of the third quartile; at the edge of the axes
BEGINNING = 0.2  # share of a run whose losses do not affect the axis
MAX_LABELS = 6  # numbers beside an axis
LABEL_HEIGHT = 0.06  # share of a vertical axis that a label takes
MAX_LETTERS = 12  # of a text beside an axis
MARGIN = 0.04  # share of a vertical axis left free at both ends
COLOURS = {"best": "val", "tie": "tie", "": "train"}


def rank(group: SettingGroup, setting: Setting) -> str:
    """Return the CSS class of a setting: best, tie, or ""."""
    standing = group.status_of(setting)
    return "tie" if standing == "tie" else "best" if standing else ""


def better(metric: str) -> str:
    """Return which direction of a metric is better, as an axis label."""
    return "← better" if metric_names.lower_is_better(metric) else "better →"


def _upward(metric: str) -> str:
    """Return the name of a metric with its better direction on a vertical axis."""
    return f"{metric} ({'↓' if metric_names.lower_is_better(metric) else '↑'} better)"


def limits(group: SettingGroup) -> tuple[float, float]:
    """Return the (best, worst) value of a run in range; outliers are drawn at the edge."""
    sign = 1.0 if metric_names.lower_is_better(group.metric) else -1.0
    values = sorted(sign * value for setting in group.settings for _, value in setting.values)
    means = sorted(sign * setting.mean[0] for setting in group.settings if setting.mean is not None)
    reach = values[0] + FAR * (means[math.ceil(0.75 * (len(means) - 1))] - values[0])
    worst = max(value for value in values if value <= reach) if reach > values[0] else values[-1]
    return sign * values[0], sign * worst


def means_plot(group: SettingGroup, numbers: dict[str, int]) -> str:
    """Plot one row per setting: its runs as dots, their mean and its interval."""
    low, high = sorted(limits(group))
    margin = (high - low or abs(high) or 1.0) * 0.5  # an interval from two runs can be wider than the range of values
    ends, rows = [low, high], []
    for setting in group.settings[:SHOWN_ROWS]:
        span = _interval(setting)
        ends += [min(max(end, low - margin), high + margin) for end in span or ()]
        dots = [(value, f"seed {seed}: " * bool(seed) + fixed(value, group.decimals)) for seed, value in setting.values]
        mean = setting.mean[0] if setting.mean is not None and len(setting.values) > 1 else None
        rows.append(
            Row(setting.label, dots, span, mean, format_value(group, setting), _attributes(group, setting, numbers))
        )
    left_out = len(group.settings) - len(rows)
    more = f"<p>{left_out} worse settings are not drawn.</p>" if left_out else ""
    axis = f"{group.metric} ({better(group.metric)})"
    return row_plot("every setting's runs, their mean and interval", axis, rows, ends=ends) + more


def gap_plot(group: SettingGroup, numbers: dict[str, int]) -> str:
    """Plot the gap of each setting to the best; if its bar includes 0, the two tie."""
    gaps = group.comparison.gaps
    best, worst = limits(group)
    reach, rows, ends = abs(worst - best), [], [0.0]
    for setting in [setting for setting in group.settings if setting.name in gaps][:SHOWN_ROWS]:
        gap, margin = gaps[setting.name]
        span = (gap - margin, gap + margin)
        ends += [min(max(end, -reach), reach) for end in span]
        text = f"{significant(gap)} ± {significant(margin)}"
        attributes = _attributes(group, setting, numbers)
        rows.append(Row(setting.label, [(gap, significant(gap))], span, None, text, attributes))
    axis = f"{group.metric}, worse than the best (← better)"
    return row_plot("how much worse than the best each setting is", axis, rows, zero=True, ends=ends)


def curves_chart(group: SettingGroup, settings: Sequence[Setting], numbers: dict[str, int]) -> Chart | None:
    """Plot the metric over steps, a line per run; None if no run has two points.

    Args:
        settings: all settings of the sweep; runs without a final value are dashed.
    """
    shown = [*group.settings, *(setting for setting in settings if not setting.values)]
    runs = [(setting, run) for setting in reversed(shown) for run in setting.runs if run.metric == group.metric]
    if not any(len(run.curve) > 1 for _, run in runs):
        return None
    best, far = limits(group)
    last = max(step for _, run in runs for step, _ in run.curve)
    late = [value for _, run in runs for step, value in run.curve if step >= BEGINNING * last and math.isfinite(value)]
    is_lower = metric_names.lower_is_better(group.metric)
    kept = [value for value in late if (value <= far if is_lower else value >= far)]
    lines = [  # the best comes last, on top
        Line(
            f"{run.number}: {setting.label}" if not run.name else run.name,
            thinned(run.curve, CURVE_POINTS),
            COLOURS[rank(group, setting)],
            is_dashed=run.value is None,
            is_bold=rank(group, setting) == "best",
            setting=numbers[setting.name],
        )
        for setting, run in runs
    ]
    ends = [best, far, *kept]
    return Chart(
        f"{_upward(group.metric)} over steps", lines, y_range=(min(ends), max(ends)), is_wide=True, names_nearest=True
    )


def parallel_chart(group: SettingGroup, keys: Sequence[str], numbers: dict[str, int]) -> Chart:
    """Plot an axis per key and one for the metric (better on top), with a line per setting."""
    best, worst = limits(group)
    columns = [VariedKey([setting.overrides.get(key, "") for setting in group.settings]) for key in keys]
    lines, is_cut = [], False
    for number, setting in enumerate(group.settings):
        assert setting.mean is not None
        share = (setting.mean[0] - worst) / (best - worst) if best != worst else 0.5
        is_cut |= share < 0
        heights = [*(column.positions[number] for column in columns), min(max(share, 0.0), 1.0)]
        name = f"{setting.label}: {fixed(setting.mean[0], group.decimals)}"
        points = [(float(place), MARGIN + (1 - 2 * MARGIN) * height) for place, height in enumerate(heights)]
        kind = rank(group, setting)
        lines.append(Line(name, points, COLOURS[kind], is_bold=kind == "best", setting=numbers[setting.name]))
    edge = ("≥ " if metric_names.lower_is_better(group.metric) else "≤ ") * is_cut
    result = [(0.0, edge + significant(worst, 4)), (1.0, significant(best, 4))] if best != worst else []
    short = short_names(list(keys))
    axes = [(short[key], _readable(_labels(column))) for key, column in zip(keys, columns, strict=True)]
    axes.append((group.metric, result))
    placed = [(name, [(MARGIN + (1 - 2 * MARGIN) * at, text) for at, text in marks]) for name, marks in axes]
    title = f"settings as lines over their keys, the best {group.metric} on top"
    return Chart(title, lines[::-1], "parallel", axes=placed, is_wide=True, names_nearest=True)


def slice_charts(group: SettingGroup, keys: Sequence[str], numbers: dict[str, int]) -> list[Chart]:
    """Plot the metric over the values of each key, a dot per setting."""
    best, worst = limits(group)
    charts = []
    for key in keys:
        column = VariedKey([setting.overrides.get(key, "") for setting in group.settings])
        lines = []
        for setting, position in zip(group.settings, column.positions, strict=True):
            assert setting.mean is not None
            value = min(max(setting.mean[0], min(best, worst)), max(best, worst))
            name, kind = f"{setting.label}: {fixed(setting.mean[0], group.decimals)}", rank(group, setting)
            lines.append(Line(name, [(position, value)], COLOURS[kind], setting=numbers[setting.name]))
        charts.append(
            Chart(
                f"{_upward(group.metric)} over {key}",
                lines[::-1],
                "slices",
                x_ticks=_labels(column),
                names_nearest=True,
            )
        )
    return charts


def importance_bars(group: SettingGroup, keys: Sequence[str]) -> str:
    """Plot a bar per key, from 0 to 100 %; pale if not significant."""
    low, high = sorted(limits(group))
    means = [min(max(setting.mean[0], low), high) for setting in group.settings if setting.mean is not None]
    found = importances({key: [setting.overrides[key] for setting in group.settings] for key in keys}, means)
    if not found:
        return "<p>Too few settings to estimate the importance of keys.</p>"
    rows = [(one.key, one.share, _share(one), not one.is_significant) for one in found]
    return share_bars("importance of each key", rows) + (
        "<p>Share of the variance that each key explains (adjusted R²); the rest is noise and interactions. Outliers "
        "count as drawn above, at the edge.</p>"
    )


def _share(one: Importance) -> str:
    return f"{one.share:.0%}".replace("%", " %") + ("" if one.is_significant else " (not significant)")


def _attributes(group: SettingGroup, setting: Setting, numbers: dict[str, int]) -> str:
    return f'class="row {rank(group, setting)}" data-s="{numbers[setting.name]}"'


def _interval(setting: Setting) -> tuple[float, float] | None:
    """Return both ends; None for one run."""
    if setting.mean is None or math.isnan(setting.mean[1]):
        return None
    mean, half = setting.mean
    return mean - half, mean + half


def _labels(axis: VariedKey) -> list[tuple[float, str]]:
    """Return (position, text) of the labels of an axis: all values, or only the ends if there are many."""
    positions = dict(sorted(dict(zip(axis.values, axis.positions, strict=True)).items(), key=lambda one: one[1]))
    pairs = list(positions.items())
    if len(pairs) > MAX_LABELS and axis.is_number:
        pairs = [pairs[0], *(pair for pair in pairs[1:2] if not pairs[0][0]), pairs[-1]]
    return [(position, _shortened(tick_text(value)) if value else "–") for value, position in pairs]


def _readable(labels: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Return the labels without inner ones that would cover another; their values are in the names of the lines."""
    kept = [*labels[:1], *(labels[-1:] if len(labels) > 1 else [])]
    for label in labels[1:-1]:
        if all(abs(label[0] - other[0]) >= LABEL_HEIGHT for other in kept):
            kept.append(label)
    return sorted(kept)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_LETTERS else "…" + text[1 - MAX_LETTERS :]
