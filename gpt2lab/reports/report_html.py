"""report.html of a run: headline numbers, curves, text, lineage, time, configuration, and the next commands."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from gpt2lab import metric_names
from gpt2lab.number_format import duration, loss, significant
from gpt2lab.reports.charts import plots, tools
from gpt2lab.reports.next_commands import next_commands, resume_command
from gpt2lab.reports.page import age, command, render_page, section, table
from gpt2lab.reports.run_curves import distillation_charts, loss_chart, run_clock, side_charts
from gpt2lab.reports.run_texts import Example, examples_html, samples_html
from gpt2lab.reports.samples_jsonl import Sample

RUNNING = "running"
RELOAD_SECONDS = 30
PHASE_COLOURS = {
    "train": "train",
    "validate": "val",
    "sample": "teacher",
    "prepare": "soft",
    "save": "tie",
    "export": "baseline",
}


@dataclass(frozen=True)
class RunFiles:
    """Contents of a run directory besides its report.

    Attributes:
        rows: content of metrics.csv.
        examples: validation pairs with the generated text (fine-tuning).
        inside: paths of inspection pages.
        files: paths of the other files and folders to link to.
        config: text of config.yaml.
        pages: source of a teacher or an initialization that is a run → (path of its report.html, folder as typed).
        folder: the run directory as typed in commands.
        patience: of a run that trains: seconds until the next page is late.
    """

    rows: list[dict[str, str]] = field(default_factory=list)
    samples: Sequence[Sample] = ()
    examples: Sequence[Example] = ()
    inside: Sequence[str] = ()
    files: Sequence[str] = ()
    config: str = ""
    pages: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    folder: str = ""
    patience: float = 0.0


def render(title: str, report: dict[str, Any], run: RunFiles) -> str:
    """Render the page from the content of report.json and the run's other files."""
    error = f'<pre class="error">{escape(str(report["error"]))}</pre>' if report.get("error") else ""
    is_running = report.get("status") == RUNNING
    words = [str(report[key]) for key in ("status", "task", "model") if report.get(key)]
    words += [f"step {report['steps']:,}"] if report.get("steps") is not None else []
    status = escape(" · ".join(words)) + " · this page is rewritten and reloads itself" * is_running
    events = _events(report)
    nothing = "No loss is logged yet." if is_running else "No loss was logged."
    curves = plots([loss_chart(run.rows, report, events), *side_charts(run.rows)])
    distillation = _distillation(report.get("metrics") or {}) + plots(distillation_charts(run.rows))
    body = [
        age(run.patience, resume_command(run.folder)) if is_running else "",
        error,
        f'<div class="tiles">{"".join(_tiles(report))}</div>',
        section(
            "Curves",
            tools([run_clock(run.rows)], True) + curves if curves else f"<p>{nothing}</p>",
        ),
        section("The student against its teacher", distillation),
        section("Validation examples", examples_html(run.examples)),
        section("Samples", samples_html(run.samples)),
        section("Events", "".join(f"<div>step {step:,.0f}: {escape(text)}</div>" for step, text in events)),
        section("Lineage", _lineage(title, report, run.pages)),
        section("Time", _phases(report.get("seconds_by_phase") or {})),
        section("Inside the model", _links({Path(page).stem: page for page in run.inside})),
        section("Next", "" if is_running else _next(report, run)),
        section("Files", _links({path: path for path in run.files})),
        section("Configuration", _configuration(report, run.config)),
    ]
    return render_page(title, title, status, "".join(body), RELOAD_SECONDS if is_running else 0)


def _tiles(report: dict[str, Any]) -> list[str]:
    def with_error(name: str) -> Callable[[float], str]:
        error = report.get(f"{name}_error")
        return lambda value: loss(value) + (f" ± {error:.3f}" if isinstance(error, int | float) else "")

    full = f"validation loss on {report.get('full_val_tokens') or 0:,} tokens"
    shown: list[tuple[str, str, Callable[[float], str]]] = [
        ("validation loss, ± between documents", "val_loss", with_error("val_loss")),
        (full, "full_val_loss", with_error("full_val_loss")),
        ("perplexity", "val_perplexity", significant),
        ("bits per byte", "bits_per_byte", loss),
        ("training loss", "train_loss", loss),
        ("parameters", "parameters", "{:,}".format),
        ("tokens seen", "tokens_seen", "{:,}".format),
        ("tokens per second", "tokens_per_second", significant),
        ("model FLOP utilisation", "mfu", "{:.1%}".format),
        ("peak memory", "peak_memory_bytes", lambda value: f"{significant(value / 1e9)} GB"),
        ("time", "seconds", duration),
    ]
    values = [(label, report.get(name), form) for label, name, form in shown]
    metrics = report.get("metrics") or {}
    values[5:5] = [(name, metrics.get(name), significant) for name in _task_metrics(metrics)]
    overlap = (report.get("data") or {}).get("val_overlap")
    values.append(("validation 13-grams also in training", overlap, "{:.1%}".format))
    tiles = [(label, value, form(value)) for label, value, form in values if isinstance(value, int | float)]
    for (task, metric), (value, error) in metric_names.benchmark_scores(metrics).items():
        tiles.append(
            (f"{task}, {metric}", value, significant(value) + (f" ± {significant(error, 2)}" if error else ""))
        )
    return [
        f'<div class="tile" title="{value}"><b>{text}</b><span>{escape(label)}</span></div>'
        for label, value, text in tiles
    ]


def _task_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of metrics on generated text (fine-tuning only)."""
    return [
        name
        for name in metrics
        if name.startswith(metric_names.VALIDATION_PREFIX) and name not in metric_names.LOWER_IS_BETTER
    ]


def _distillation(metrics: dict[str, Any]) -> str:
    """Render the distillation metrics with their meaning; empty for a run without a teacher."""
    rows = [
        f'<tr><td class="name">{escape(label)}</td><td class="number">{significant(metrics[name])}</td>'
        f'<td class="text">{escape(meaning)}</td></tr>'
        for name, (label, meaning) in {**metric_names.DISTILLATION, **metric_names.BETWEEN_TOKENIZERS}.items()
        if name in metrics
    ]
    return f'<div class="scroll"><table class="grid">{"".join(rows)}</table></div>' if rows else ""


def _events(report: dict[str, Any]) -> list[tuple[float, str]]:
    """Return (step, text) of resumes, loss spikes, the exported step, and an early end."""
    found = [(float(step), str(text)) for step, text in report.get("events") or []]
    if report.get("export") == "best" and report.get("best_step"):
        found.append((float(report["best_step"]), "best validation, exported"))
    if report.get("stopped_by"):
        found.append((float(report.get("steps") or 0), f"stopped by {report['stopped_by']}"))
    if report.get("error"):
        found.append((float(report.get("steps") or 0), "failed"))
    return sorted(found)


def _lineage(title: str, report: dict[str, Any], pages: Mapping[str, tuple[str, str]]) -> str:
    data, init, teacher = (report.get(key) or {} for key in ("data", "init", "teacher"))
    steps = []
    if data:
        steps.append(
            ("data", str(data.get("name", "")), f"{data.get('tokens') or 0:,} tokens, hash {data.get('hash')}")
        )
    if teacher:
        value = teacher.get("val_loss")
        steps.append(("teacher", str(teacher.get("source", "")), f"validation loss {loss(value)}" if value else ""))
    if init:
        layers = ", ".join(f"{key} {value}" for key, value in init.items() if key != "source")
        steps.append(("initialization", str(init.get("source", "")), layers))
    steps.append(("this run", title, str(report.get("model", ""))))
    items = "".join(
        f"<li><small>{kind}</small>{_linked(name, pages)}<small>{escape(more)}</small></li>"
        for kind, name, more in steps
    )
    return f'<ol class="line">{items}</ol>'


def _linked(name: str, pages: Mapping[str, tuple[str, str]]) -> str:
    if name not in pages:
        return escape(name)
    page, folder = pages[name]
    return f'<a href="{escape(page)}">{escape(folder)}</a>'


def _phases(seconds: Mapping[str, float]) -> str:
    """Render the time by phase as one bar with a legend."""
    seconds = {name: value for name, value in seconds.items() if value}
    whole = sum(seconds.values())
    if not whole:
        return ""
    longest_first = sorted(seconds.items(), key=lambda item: -item[1])
    colours = {name: f"background:var(--{PHASE_COLOURS.get(name, 'line')})" for name in seconds}
    bar = "".join(
        f'<i style="width:{100 * value / whole:.2f}%;{colours[name]}" title="{escape(name)} {duration(value)}"></i>'
        for name, value in longest_first
    )
    key = "".join(
        f'<li><i style="{colours[name]}"></i>{escape(name)} {duration(value)} ({value / whole:.0%})</li>'
        for name, value in longest_first
    )
    return f'<div class="phases">{bar}</div><ul class="key">{key}</ul>'


def _links(pages: Mapping[str, str]) -> str:
    return " · ".join(f'<a href="{escape(page)}">{escape(name)}</a>' for name, page in pages.items())


def _next(report: dict[str, Any], run: RunFiles) -> str:
    commands = next_commands(report, run.folder, "hf" in run.files)
    return "".join(f"<div>{escape(name.capitalize())}</div>{command(text)}" for name, text in commands.items())


def _configuration(report: dict[str, Any], config: str) -> str:
    given = str(report.get("command") or "")
    again = f"<div>The command of this run</div>{command(given)}{_given_keys(given)}" if given else ""
    if isinstance(continued := report.get("continued_with"), list):
        again += f"<div>Continued with <code>{escape(shlex.join(map(str, continued)))}</code></div>"
    facts = f'<div class="scroll"><table class="grid">{"".join(_facts(report))}</table></div>'
    folded = {"config.yaml": f'<pre class="long">{escape(config)}</pre>' if config else "", "report.json": facts}
    return again + "".join(
        f"<details><summary>{name}</summary>{content}</details>" for name, content in folded.items() if content
    )


def _given_keys(given: str) -> str:
    """Render the keys that the command sets; all others have their defaults."""
    try:
        words = [word.partition("=") for word in shlex.split(given)]
    except ValueError:
        return ""
    rows = [
        ("", [f"<code>{escape(key)}</code>", f"<code>{escape(value)}</code>"]) for key, is_key, value in words if is_key
    ]
    return table([("key set by the command", "name"), ("value", "")], rows) if rows else ""


def _facts(report: dict[str, Any]) -> list[str]:
    """Render all of report.json, nested values as `outer.inner`."""
    rows = []
    for key, value in report.items():
        nested = value.items() if isinstance(value, dict) else [("", value)]
        for inner, leaf in nested:
            name = f"{key}.{inner}" if inner else key
            text = "" if leaf is None else f"{leaf:.6g}" if isinstance(leaf, float) else str(leaf)
            rows.append(f'<tr><td class="name">{escape(name)}</td><td class="text">{escape(text)}</td></tr>')
    return rows
