"""sweep.html: a sweep on one page, with the winner or ties, all settings, their curves and key importances."""

from collections.abc import Sequence
from html import escape

from gpt2lab.analysis.hyperparameter_importance import importances
from gpt2lab.analysis.sweep_axes import short_names
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
from gpt2lab.reports.report_html import STYLE
from gpt2lab.reports.svg_rows import OWN_STYLE
from gpt2lab.reports.sweep_plots import (
    SETTINGS_STYLE,
    curves_plot,
    gap_plot,
    importance_bars,
    limits,
    means_plot,
    parallel_plot,
    rank,
)

PAGE_STYLE = """
:root { --tie: #d9932f; } @media (prefers-color-scheme: dark) { :root { --tie: #e9b872; } }
.verdict { font-size: 17px; border-left: 4px solid var(--val); padding-left: 14px; margin: 18px 0 8px; }
.scroll { overflow-x: auto; }
.settings th { text-align: left; color: var(--soft); font-weight: 400; padding: 6px 12px 6px 0; }
.settings td, .settings td:first-child { width: auto; padding-right: 12px; white-space: nowrap; color: inherit; }
.settings .number { text-align: right; font-variant-numeric: tabular-nums; }
.settings tr.best td { font-weight: 600; } .settings tr.best .standing { color: var(--val); }
.settings tr.tie .standing { color: var(--tie); }
svg .value { fill: var(--ink); paint-order: stroke; stroke: var(--paper); stroke-width: 3px; font-size: 11px; }
"""
SCRIPT = """
let hot = [];
document.addEventListener('mouseover', event => {
  const own = event.target.closest('[data-s]');
  hot.forEach(element => element.classList.remove('on'));
  hot = own ? [...document.querySelectorAll(`[data-s="${own.dataset.s}"]`)] : [];
  hot.forEach(element => element.classList.add('on'));
  document.body.classList.toggle('hot', hot.length > 0);
});
"""
NOTE = (
    "± of a mean: half its 95 % interval, over seeds. A setting behind the best by more than its ± is worse, the "
    "others tie. A seed affects all settings alike, so differences are more precise than means."
)
DOCUMENTS_NOTE = (
    "± documents: standard error of the mean loss over seeds, between validation documents. Behind, by document: the "
    "difference to the best within each document, with its 95 % interval. Neither includes the error between seeds."
)
RELOAD = '<meta http-equiv="refresh" content="30">'


def render(title: str, results: SweepResults) -> str:
    """Render the page; it reloads itself until all runs have ended."""
    runs = results.runs
    counts = {run.outcome: sum(one.outcome == run.outcome for one in runs) for run in runs}
    status = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    shared = f"<br>All: <code>{escape(' '.join(results.shared))}</code>" if results.shared else ""
    numbers = {setting.name: number for number, setting in enumerate(results.settings)}
    groups = "".join(_verdict(group, results) for group in results.groups)
    plots = "".join(_plots(group, results, numbers) for group in results.groups)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
{"" if results.is_over else RELOAD}<title>{escape(title)}</title>
<style>{STYLE}{OWN_STYLE}{PAGE_STYLE}{SETTINGS_STYLE}</style></head><body>
<h1>Sweep {escape(title)}</h1><p class="status">{len(runs)} runs: {escape(status)}{shared}</p>
{groups or "<p>No run has finished yet.</p>"}
<h2>Settings</h2>{_table(results, numbers)}
{plots}{_failures(runs)}
<script>{SCRIPT}</script></body></html>
"""


def _verdict(group: SettingGroup, results: SweepResults) -> str:
    so_far = "" if results.is_over else "So far. "
    condition = f"{group.metric} {group.condition}: " if len(results.groups) > 1 else ""
    again = "The winner" if group.comparison.winner else "The best seen"
    return (
        f'<p class="verdict">{escape(so_far + condition + summarize(group))}</p>'
        f"<div>{again} again:</div><pre>{escape(group.best_command)}</pre>"
    )


def _table(results: SweepResults, numbers: dict[str, int]) -> str:
    names = list(short_names(results.keys).values())
    metrics = list(dict.fromkeys(group.metric for group in results.groups))
    has_gaps = any(group.comparison.gaps for group in results.groups)
    has_documents = any(format_document_error(group, setting) for group in results.groups for setting in group.settings)
    head = "".join(
        f"<th{kind}>{escape(name)}</th>"
        for name, kind in [
            ("", ""),
            *((name, "") for name in names),
            (metrics[0] if len(metrics) == 1 else "value", ' class="number"'),
            *[("± documents", ' class="number"')] * has_documents,
            *[("behind the best", ' class="number"')] * has_gaps,
            *[("behind, by document", ' class="number"')] * has_documents,
            ("seconds", ' class="number"'),
            ("runs", ""),
        ]
    )
    group_of = {setting.name: group for group in results.groups for setting in group.settings}
    rows = ""
    for setting in results.settings:
        group = group_of.get(setting.name)
        rows += _row(setting, group, numbers[setting.name], len(metrics) > 1, has_gaps, has_documents)
    note = (f"<p>{NOTE}</p>" if has_gaps else "") + (f"<p>{DOCUMENTS_NOTE}</p>" if has_documents else "")
    return f'<div class="scroll"><table class="settings"><tr>{head}</tr>{rows}</table></div>{note}'


def _row(
    setting: Setting,
    group: SettingGroup | None,
    number: int,
    names_metric: bool,
    has_gaps: bool,
    has_documents: bool,
) -> str:
    standing = group.status_of(setting) if group else ""
    metric = f"{group.metric} " if group and names_metric else ""
    seconds = "" if setting.seconds is None else f"{setting.seconds:,.0f}"
    cells = [
        f'<td class="standing">{standing}</td>',
        *(f"<td>{escape(value) or '–'}</td>" for value in setting.overrides.values()),
        f'<td class="number">{escape(metric)}{format_value(setting)}</td>',
        *[f'<td class="number">{format_document_error(group, setting)}</td>'] * has_documents,
        *[f'<td class="number">{format_gap(group, setting)}</td>'] * has_gaps,
        *[f'<td class="number">{format_document_difference(group, setting)}</td>'] * has_documents,
        f'<td class="number">{seconds}</td>',
        f"<td>{' '.join(_link(run) for run in setting.runs)}</td>",
    ]
    own = rank(group, setting) if group else ""
    return f'<tr data-s="{number}" class="{own}">{"".join(cells)}</tr>'


def _link(run: SweepRun) -> str:
    """Render the run's number as a link to its report, with seed and value as tooltip."""
    seed = f"seed {run.overrides[SEED]}, " if SEED in run.overrides else ""
    tooltip = seed + (run.outcome if run.value is None else f"{run.value:.4f}")
    shown = str(run.number) + ("" if run.value is not None else f" {run.outcome}")
    href = f' href="{escape(run.page)}"' if run.page else ""
    return f'<a{href} title="{escape(tooltip)}">{escape(shown)}</a>'


def _plots(group: SettingGroup, results: SweepResults, numbers: dict[str, int]) -> str:
    of = f" of {group.metric} {group.condition}".rstrip() if len(results.groups) > 1 else ""
    parts = [f"<h2>{'Means' if results.has_seeds else 'Values'}{escape(of)}</h2>", means_plot(group, numbers)]
    if group.comparison.gaps:
        parts += [f"<h2>Behind the best{escape(of)}</h2>", gap_plot(group, numbers)]
    if curves := curves_plot(group, results.settings, numbers):
        parts += [f"<h2>Learning curves{escape(of)}</h2>", curves]
    if len(group.settings) < 2:
        return "".join(parts)
    keys = [key for key in results.keys if len({setting.overrides[key] for setting in group.settings}) > 1]
    parts += [f"<h2>Keys and results{escape(of)}</h2>", parallel_plot(group, keys, numbers)]
    parts += [f"<h2>Importance of keys{escape(of)}</h2>", _importance(group, keys)]
    return "".join(parts)


def _importance(group: SettingGroup, keys: Sequence[str]) -> str:
    low, high = sorted(limits(group))
    means = [min(max(setting.mean[0], low), high) for setting in group.settings if setting.mean is not None]
    found = importances({key: [setting.overrides[key] for setting in group.settings] for key in keys}, means)
    if not found:
        return "<p>Too few settings to estimate the importance of keys.</p>"
    return importance_bars(found) + (
        "<p>Share of the variance that each key explains (adjusted R²); the rest is noise and interactions. Outliers "
        "count as drawn above, at the edge.</p>"
    )


def _failures(runs: Sequence[SweepRun]) -> str:
    blocks = [
        f"<div>{run.number}: {escape(' '.join(f'{key}={value}' for key, value in run.overrides.items()))}, "
        f'{escape(run.status)}</div><pre class="error">{escape(run.error)}</pre>'
        for run in runs
        if run.error
    ]
    return f"<h2>Failed</h2>{''.join(blocks)}" if blocks else ""
