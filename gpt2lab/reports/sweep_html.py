"""sweep.html: a sweep on one page — who won or tied, every setting, its curves, and which key mattered."""

from collections.abc import Sequence
from html import escape

from gpt2lab.analysis.hyperparameter_importance import importances
from gpt2lab.analysis.sweep_axes import short_names
from gpt2lab.analysis.sweep_runs import (
    SEED,
    Contest,
    Setting,
    SweepResults,
    SweepRun,
    behind_in_words,
    document_difference_in_words,
    document_error_in_words,
    in_one_sentence,
    value_in_words,
)
from gpt2lab.reports.report_html import STYLE
from gpt2lab.reports.svg_rows import OWN_STYLE
from gpt2lab.reports.sweep_plots import (
    SETTINGS_STYLE,
    behind_plot,
    curves_plot,
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
    "± of a mean: half its 95 % interval, over seeds. What lies behind the best by more than its ± is worse, the rest "
    "tie: seeds move all settings together, so differences are known better than means."
)
DOCUMENTS_NOTE = (
    "± documents: standard error of the mean loss over seeds, between validation documents. Behind, by document: the "
    "difference to the best within each document, with its 95 % interval. Neither holds the error between seeds."
)
RELOAD = '<meta http-equiv="refresh" content="30">'


def render(title: str, results: SweepResults) -> str:
    """The whole page; while runs are still to come it loads itself anew."""
    runs = results.runs
    counts = {run.outcome: sum(one.outcome == run.outcome for one in runs) for run in runs}
    status = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    shared = f"<br>All: <code>{escape(' '.join(results.shared))}</code>" if results.shared else ""
    numbers = {setting.name: number for number, setting in enumerate(results.settings)}
    contests = "".join(_verdict(contest, results) for contest in results.contests)
    plots = "".join(_plots(contest, results, numbers) for contest in results.contests)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
{"" if results.is_over else RELOAD}<title>{escape(title)}</title>
<style>{STYLE}{OWN_STYLE}{PAGE_STYLE}{SETTINGS_STYLE}</style></head><body>
<h1>Sweep {escape(title)}</h1><p class="status">{len(runs)} runs: {escape(status)}{shared}</p>
{contests or "<p>No run has finished yet.</p>"}
<h2>Settings</h2>{_table(results, numbers)}
{plots}{_failures(runs)}
<script>{SCRIPT}</script></body></html>
"""


def _verdict(contest: Contest, results: SweepResults) -> str:
    so_far = "" if results.is_over else "So far. "
    apart = f"{contest.metric} {contest.apart}: " if len(results.contests) > 1 else ""
    again = "The winner" if contest.comparison.winner else "The best seen"
    return (
        f'<p class="verdict">{escape(so_far + apart + in_one_sentence(contest))}</p>'
        f"<div>{again} again:</div><pre>{escape(contest.best_command)}</pre>"
    )


def _table(results: SweepResults, numbers: dict[str, int]) -> str:
    names = list(short_names(results.keys).values())
    metrics = list(dict.fromkeys(contest.metric for contest in results.contests))
    has_behind = any(contest.comparison.behind for contest in results.contests)
    has_documents = any(
        document_error_in_words(contest, setting) for contest in results.contests for setting in contest.settings
    )
    head = "".join(
        f"<th{kind}>{escape(name)}</th>"
        for name, kind in [
            ("", ""),
            *((name, "") for name in names),
            (metrics[0] if len(metrics) == 1 else "value", ' class="number"'),
            *[("± documents", ' class="number"')] * has_documents,
            *[("behind the best", ' class="number"')] * has_behind,
            *[("behind, by document", ' class="number"')] * has_documents,
            ("seconds", ' class="number"'),
            ("runs", ""),
        ]
    )
    contest_of = {setting.name: contest for contest in results.contests for setting in contest.settings}
    rows = ""
    for setting in results.settings:
        contest = contest_of.get(setting.name)
        rows += _row(setting, contest, numbers[setting.name], len(metrics) > 1, has_behind, has_documents)
    note = (f"<p>{NOTE}</p>" if has_behind else "") + (f"<p>{DOCUMENTS_NOTE}</p>" if has_documents else "")
    return f'<div class="scroll"><table class="settings"><tr>{head}</tr>{rows}</table></div>{note}'


def _row(
    setting: Setting,
    contest: Contest | None,
    number: int,
    names_metric: bool,
    has_behind: bool,
    has_documents: bool,
) -> str:
    standing = contest.standing(setting) if contest else ""
    metric = f"{contest.metric} " if contest and names_metric else ""
    seconds = "" if setting.seconds is None else f"{setting.seconds:,.0f}"
    cells = [
        f'<td class="standing">{standing}</td>',
        *(f"<td>{escape(value) or '–'}</td>" for value in setting.told.values()),
        f'<td class="number">{escape(metric)}{value_in_words(setting)}</td>',
        *[f'<td class="number">{document_error_in_words(contest, setting)}</td>'] * has_documents,
        *[f'<td class="number">{behind_in_words(contest, setting)}</td>'] * has_behind,
        *[f'<td class="number">{document_difference_in_words(contest, setting)}</td>'] * has_documents,
        f'<td class="number">{seconds}</td>',
        f"<td>{' '.join(_link(run) for run in setting.runs)}</td>",
    ]
    own = rank(contest, setting) if contest else ""
    return f'<tr data-s="{number}" class="{own}">{"".join(cells)}</tr>'


def _link(run: SweepRun) -> str:
    """The run's number, leading to its report, and its seed and value where the mouse is on it."""
    seed = f"seed {run.told[SEED]}, " if SEED in run.told else ""
    says = seed + (run.outcome if run.value is None else f"{run.value:.4f}")
    shown = str(run.number) + ("" if run.value is not None else f" {run.outcome}")
    place = f' href="{escape(run.page)}"' if run.page else ""
    return f'<a{place} title="{escape(says)}">{escape(shown)}</a>'


def _plots(contest: Contest, results: SweepResults, numbers: dict[str, int]) -> str:
    of = f" of {contest.metric} {contest.apart}".rstrip() if len(results.contests) > 1 else ""
    parts = [f"<h2>{'Means' if results.has_seeds else 'Values'}{escape(of)}</h2>", means_plot(contest, numbers)]
    if contest.comparison.behind:
        parts += [f"<h2>Behind the best{escape(of)}</h2>", behind_plot(contest, numbers)]
    if curves := curves_plot(contest, results.settings, numbers):
        parts += [f"<h2>Learning curves{escape(of)}</h2>", curves]
    if len(contest.settings) < 2:
        return "".join(parts)
    keys = [key for key in results.keys if len({setting.told[key] for setting in contest.settings}) > 1]
    parts += [f"<h2>Keys and results{escape(of)}</h2>", parallel_plot(contest, keys, numbers)]
    parts += [f"<h2>What mattered{escape(of)}</h2>", _importance(contest, keys)]
    return "".join(parts)


def _importance(contest: Contest, keys: Sequence[str]) -> str:
    low, high = sorted(limits(contest))
    means = [min(max(setting.mean[0], low), high) for setting in contest.settings if setting.mean is not None]
    found = importances({key: [setting.told[key] for setting in contest.settings] for key in keys}, means)
    if not found:
        return "<p>Too few settings to say how much each key explains.</p>"
    return importance_bars(found) + (
        "<p>How much of the variance each key explains by itself, less what chance would; the rest is chance and what "
        "keys do only together. What is far off counts as it is drawn above, at the edge.</p>"
    )


def _failures(runs: Sequence[SweepRun]) -> str:
    blocks = [
        f"<div>{run.number}: {escape(' '.join(f'{key}={value}' for key, value in run.told.items()))}, "
        f'{escape(run.status)}</div><pre class="error">{escape(run.error)}</pre>'
        for run in runs
        if run.error
    ]
    return f"<h2>Failed</h2>{''.join(blocks)}" if blocks else ""
