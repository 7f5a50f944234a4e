"""sweep.html: a sweep on one page, with the winner or ties, all settings, their curves and key importances."""

from collections.abc import Sequence
from html import escape
from itertools import compress

from gpt2lab.analysis.sweep_axes import override_value, short_names
from gpt2lab.analysis.sweep_runs import (
    SEED,
    Setting,
    SettingGroup,
    SweepResults,
    SweepRun,
    format_document_difference,
    format_document_error,
    format_gap,
    format_value,
    summarize,
)
from gpt2lab.number_format import duration, significant
from gpt2lab.reports.charts import plots
from gpt2lab.reports.page import age, command, render_page, section, table
from gpt2lab.reports.sweep_charts import (
    curves_chart,
    gap_plot,
    importance_bars,
    means_plot,
    parallel_chart,
    rank,
    slice_charts,
)

RELOAD_SECONDS = 30
LONGEST_JOB = 3600.0  # seconds, of a sweep of which no job has ended
MAX_KEYS = 8  # shown as columns and axes; runs that differ in more are compared by name
NOTE = (
    "± of a mean: half its 95 % interval, over seeds. A setting behind the best by more than its ± is worse, the "
    "others tie. A seed affects all settings alike, so differences are more precise than means."
)
DOCUMENTS_NOTE = (
    "± documents: standard error of the mean loss over seeds, between validation documents. Behind, by document: the "
    "difference to the best within each document, with its 95 % interval. Neither includes the error between seeds."
)


def render(title: str, results: SweepResults) -> str:
    """Render the page; it reloads itself until all runs have ended."""
    shared = f"<br>All: <code>{escape(' '.join(results.shared))}</code>" if results.shared else ""
    status = f"{len(results.runs)} runs: {escape(counts(results))}{shared}"
    body = results_html(results) + section("Failed", _failures(results.runs))
    longest = max((run.seconds for run in results.runs if run.seconds), default=LONGEST_JOB)
    top = "" if results.is_over else age(60 + 3 * longest)
    return render_page(title, f"Sweep {title}", status, top + body, 0 if results.is_over else RELOAD_SECONDS)


def results_html(results: SweepResults, is_comparison: bool = False) -> str:
    """Render verdicts, the table of settings, and the charts of each group of comparable settings.

    Args:
        is_comparison: of runs by name, whose page has its own curves and table of keys.
    """
    numbers = setting_numbers(results)
    verdicts = "".join(_verdict(group, results) for group in results.groups)
    nothing = "No run has a result." if results.is_over else "No run has finished yet."
    shown = "".join(_plots(group, results, numbers, not is_comparison) for group in results.groups)
    return (verdicts or f"<p>{nothing}</p>") + section("Settings", _table(results, numbers, is_comparison)) + shown


def setting_numbers(results: SweepResults) -> dict[str, int]:
    """Return the number of each setting, by which the page highlights it."""
    return {setting.name: number for number, setting in enumerate(results.settings)}


def _shown_keys(results: SweepResults) -> list[str]:
    """Return the varied keys; none if there are too many for columns and axes."""
    return results.keys if len(results.keys) <= MAX_KEYS else []


def counts(results: SweepResults) -> str:
    """Return how many runs have which outcome."""
    found = {run.outcome: sum(one.outcome == run.outcome for one in results.runs) for run in results.runs}
    return ", ".join(f"{count} {outcome}" for outcome, count in found.items())


def _verdict(group: SettingGroup, results: SweepResults) -> str:
    so_far = "" if results.is_over else "So far. "
    condition = f"{group.metric} {group.condition}: " if len(results.groups) > 1 else ""
    again = "The winner" if group.comparison.winner else "The best seen"
    return (
        f'<p class="verdict">{escape(so_far + condition + summarize(group))}</p>'
        f"<div>{again} again:</div>{command(group.best_command)}"
    )


def _table(results: SweepResults, numbers: dict[str, int], is_comparison: bool) -> str:
    keys = [] if is_comparison else _shown_keys(results)
    names = [(name, "") for name in short_names(keys).values()] or [("setting", "setting")]
    metrics = list(dict.fromkeys(group.metric for group in results.groups))
    has_gaps = any(group.comparison.gaps for group in results.groups)
    has_documents = any(format_document_error(group, setting) for group in results.groups for setting in group.settings)
    columns = [
        ("", "standing"),
        *names,
        (metrics[0] if len(metrics) == 1 else "value", "number"),
        ("± documents", "number"),
        ("behind the best", "number"),
        ("behind, by document", "number interval"),
        ("time", "number"),
        ("runs", "runs"),
    ]
    left_out = {"± documents", "behind, by document"} if not has_documents else set()
    left_out |= {"behind the best"} if not has_gaps else set()
    is_shown = [name not in left_out for name, _ in columns]
    group_of = {setting.name: group for group in results.groups for setting in group.settings}
    rows = []
    for setting in results.settings:
        group = group_of.get(setting.name)
        own = rank(group, setting) if group else ""
        cells = compress(_cells(setting, group, keys, len(metrics) > 1), is_shown)
        rows.append((f'data-s="{numbers[setting.name]}" class="{own}"', list(cells)))
    note = (f"<p>{NOTE}</p>" if has_gaps else "") + (f"<p>{DOCUMENTS_NOTE}</p>" if has_documents else "")
    return table(list(compress(columns, is_shown)), rows, "settings") + note


def _cells(setting: Setting, group: SettingGroup | None, keys: Sequence[str], names_metric: bool) -> list[str]:
    """Render all cells of a setting, in the order of the columns."""
    metric = f"{group.metric} " if group and names_metric else ""
    return [
        group.status_of(setting) if group else "",
        *([_value(setting.overrides[key]) for key in keys] or [escape(setting.label)]),
        escape(metric) + format_value(group, setting),
        format_document_error(group, setting),
        format_gap(group, setting),
        format_document_difference(group, setting).replace(" … ", "\N{NO-BREAK SPACE}…\N{NO-BREAK SPACE}"),
        "" if setting.seconds is None else duration(setting.seconds),
        f"<span>{' '.join(_link(run) for run in setting.runs)}</span>",
    ]


def _value(value: str) -> str:
    """Render the value of an override, in full as tooltip."""
    return f'<span title="{escape(value)}">{escape(override_value(value)) or "–"}</span>'


def _link(run: SweepRun) -> str:
    """Render the run's number or name as a link to its report, with seed and value as tooltip."""
    seed = f"seed {run.overrides[SEED]}, " if SEED in run.overrides else ""
    tooltip = seed + (run.outcome if run.value is None else significant(run.value, 5))
    shown = run.name or f"folder\N{NO-BREAK SPACE}{run.number}"
    shown += "" if run.value is not None else f" ({run.outcome})"
    href = f' href="{escape(run.page)}"' if run.page else ""
    return f'<a{href} title="{escape(tooltip)}">{escape(shown)}</a>'


def _plots(group: SettingGroup, results: SweepResults, numbers: dict[str, int], has_curves: bool) -> str:
    of = f" of {group.metric} {group.condition}".rstrip() if len(results.groups) > 1 else ""
    parts = [section(("Means" if results.has_seeds else "Values") + of, means_plot(group, numbers))]
    if group.comparison.gaps:
        parts.append(section(f"Behind the best{of}", gap_plot(group, numbers)))
    if has_curves and (curves := curves_chart(group, results.settings, numbers)):
        parts.append(section(f"Learning curves{of}", plots([curves])))
    if len(group.settings) > 2 and _shown_keys(results):
        keys = [key for key in _shown_keys(results) if len({setting.overrides[key] for setting in group.settings}) > 1]
        parts.append(section(f"Keys and results{of}", plots([parallel_chart(group, keys, numbers)])))
        parts.append(section(f"Slices{of}", plots(slice_charts(group, keys, numbers))))
        parts.append(section(f"Importance of keys{of}", importance_bars(group, keys)))
    return "".join(parts)


def _failures(runs: Sequence[SweepRun]) -> str:
    return "".join(
        f"<div>folder {run.number}: {escape(' '.join(f'{key}={value}' for key, value in run.overrides.items()))}, "
        f'{escape(run.status)}</div><pre class="error">{escape(run.error)}</pre>'
        for run in runs
        if run.error
    )
