"""report.html of a run: metrics, loss curve and samples in a single file without scripts, fonts or network."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from gpt2lab import metric_names
from gpt2lab.reports.samples_jsonl import Sample
from gpt2lab.storage.metrics_csv import series

Points = list[tuple[int, float]]

WIDTH, HEIGHT = 860, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 48  # margins of the plot, in pixels
SHOWN_SAMPLES = 12

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #66707d; --line: #dde2e8; --paper: #fff; --panel: #f6f8fa;
  --train: #7a9cc6; --val: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #98a2b0; --line: #333c48; --paper: #14181e;
  --panel: #1c222b; --train: #6f9ad3; --val: #fb923c; } }
body { margin: 0 auto; max-width: 900px; padding: 32px 20px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 36px 0 12px; }
.status { color: var(--soft); margin: 4px 0 24px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px; }
.tile { background: var(--panel); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; } .tile span { color: var(--soft); }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); } .curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.train { stroke: var(--train); } .val { stroke: var(--val); } circle.val { fill: var(--val); }
a { color: var(--train); }
table { border-collapse: collapse; width: 100%; } td { border-top: 1px solid var(--line); padding: 6px 8px 6px 0;
  vertical-align: top; overflow-wrap: anywhere; } td:first-child { color: var(--soft); width: 180px; }
.figures td:first-child { white-space: nowrap; }
.figures td:nth-child(2) { text-align: right; padding-right: 20px; font-variant-numeric: tabular-nums; }
pre { background: var(--panel); border-radius: 8px; padding: 12px 14px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.45 ui-monospace, monospace; margin: 6px 0 18px; max-height: 300px; overflow-y: auto; }
pre b { color: var(--val); font-weight: 600; }
.error { border-left: 4px solid var(--val); }
"""


def render(
    title: str, report: dict[str, Any], rows: list[dict[str, str]], samples: list[Sample], inside: Sequence[str] = ()
) -> str:
    """Render the page.

    Args:
        report: content of report.json.
        rows: content of metrics.csv.
        samples: all samples; those of the newest step are shown.
        inside: paths of inspection pages to link to.
    """
    error = f'<pre class="error">{escape(str(report["error"]))}</pre>' if report.get("error") else ""
    status = " · ".join(str(report[key]) for key in ("status", "task", "model") if report.get(key))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1><p class="status">{escape(status)}</p>{error}
<div class="tiles">{"".join(_tiles(report))}</div>
<h2>Loss</h2>{loss_curve(series(rows, metric_names.TRAIN_LOSS), series(rows, metric_names.VAL_LOSS))}
{_distillation(report.get("metrics") or {})}<h2>Samples</h2>{_samples(samples)}
{_inside(inside)}<h2>Facts</h2><table>{"".join(_facts(report))}</table>
</body></html>
"""


def loss_curve(train: Points, val: Points) -> str:
    """Render an inline SVG with axes, ticks and legend; points are (step, nats per token)."""
    points = [(step, value) for step, value in [*train, *val] if math.isfinite(value)]
    if not points:
        return "<p>No loss was logged.</p>"
    x_ticks = ticks(0, max(step for step, _ in points), 8)
    y_ticks = ticks(min(value for _, value in points), max(value for _, value in points), 6)
    (x_low, x_high), (y_low, y_high) = (x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1])

    def x(step: float) -> float:
        return round(LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="training and validation loss over steps">']
    parts += step_axes([(x(tick), tick) for tick in x_ticks], [(y(tick), tick) for tick in y_ticks])
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">nats per token</text>')
    for name, curve in (("train", train), ("val", val)):
        path = " ".join(f"{x(step)},{y(value)}" for step, value in curve if math.isfinite(value))
        parts.append(f'<polyline class="curve {name}" points="{path}"/>')
    parts += [f'<circle class="val" cx="{x(s)}" cy="{y(v)}" r="3"/>' for s, v in val if math.isfinite(v)]
    for row, (name, label) in enumerate((("train", "training"), ("val", "validation"))):
        height = TOP + 14 + 20 * row
        parts.append(f'<line class="curve {name}" x1="{WIDTH - 130}" x2="{WIDTH - 106}" y1="{height}" y2="{height}"/>')
        parts.append(f'<text x="{WIDTH - 98}" y="{height + 4}">{label}</text>')
    return "".join([*parts, "</svg>"])


def step_axes(x_ticks: list[tuple[float, float]], y_ticks: list[tuple[float, float]]) -> list[str]:
    """Render grid and tick labels of a curve over optimizer steps, from (pixel, value) of the ticks."""
    parts = []
    for at, tick in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4}" text-anchor="end">{tick:g}</text>')
    for at, tick in x_ticks:
        parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    return [*parts, f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">optimizer step</text>']


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers that enclose [low, high]."""
    span = high - low or abs(high) or 1.0
    rough = span / count
    magnitude = 10 ** math.floor(math.log10(rough))
    step = magnitude * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def _tiles(report: dict[str, Any]) -> list[str]:
    shown = [
        ("validation loss", report.get("val_loss"), "{:.4f}"),
        ("its standard error, between documents", report.get("val_loss_error"), "{:.4f}"),
        (f"validation loss on {report.get('full_val_tokens') or 0:,} tokens", report.get("full_val_loss"), "{:.4f}"),
        ("its standard error", report.get("full_val_loss_error"), "{:.4f}"),
        ("perplexity", report.get("val_perplexity"), "{:,.2f}"),
        ("bits per byte", report.get("bits_per_byte"), "{:.4f}"),
        ("training loss", report.get("train_loss"), "{:.4f}"),
        *((name, report.get("metrics", {}).get(name), "{:.4f}") for name in _task_metrics(report)),
        ("parameters", report.get("parameters"), "{:,}"),
        ("steps", report.get("steps"), "{:,}"),
        ("validation 13-grams also in training", (report.get("data") or {}).get("val_overlap"), "{:.1%}"),
        ("tokens seen", report.get("tokens_seen"), "{:,}"),
        ("tokens per second", report.get("tokens_per_second"), "{:,.0f}"),
        ("model FLOP utilisation", report.get("mfu"), "{:.1%}"),
        ("peak memory", report.get("peak_memory_bytes") and report["peak_memory_bytes"] / 1e9, "{:.2f} GB"),
        ("seconds", report.get("seconds"), "{:,.0f}"),
    ]
    return [
        f'<div class="tile"><b>{form.format(value)}</b><span>{escape(label)}</span></div>'
        for label, value, form in shown
        if value is not None
    ]


def _task_metrics(report: dict[str, Any]) -> list[str]:
    """Return the names of metrics on generated text (fine-tuning only)."""
    common = {metric_names.VAL_LOSS, metric_names.VAL_PERPLEXITY, metric_names.VAL_BITS_PER_BYTE}
    names = report.get("metrics", {})
    return [name for name in names if name.startswith("val/") and name not in common]


def _distillation(metrics: dict[str, Any]) -> str:
    """Render the distillation metrics with their meaning; empty for a run without a teacher."""
    rows = [
        f"<tr><td>{escape(label)}</td><td>{metrics[name]:.4f}</td><td>{escape(meaning)}</td></tr>"
        for name, (label, meaning) in {**metric_names.DISTILLATION, **metric_names.BETWEEN_TOKENIZERS}.items()
        if name in metrics
    ]
    return f'<h2>The student against its teacher</h2><table class="figures">{"".join(rows)}</table>\n' if rows else ""


def _samples(samples: list[Sample]) -> str:
    if not samples:
        return "<p>No samples were written.</p>"
    newest = [sample for sample in samples if sample.step == samples[-1].step][:SHOWN_SAMPLES]
    blocks = [
        f"<div>{escape(s.method)}, step {s.step}</div><pre><b>{escape(s.prompt)}</b>{escape(s.written)}</pre>"
        for s in newest
    ]
    return "".join(blocks)


def _inside(pages: Sequence[str]) -> str:
    """Render links to the inspection pages."""
    links = " · ".join(f'<a href="{escape(page)}">{escape(Path(page).stem)}</a>' for page in pages)
    return f"<h2>Inside the model</h2><p>{links}</p>\n" if pages else ""


def _facts(report: dict[str, Any]) -> list[str]:
    """Render all of report.json, nested values as `outer.inner`."""
    rows = []
    for key, value in report.items():
        nested = value.items() if isinstance(value, dict) else [("", value)]
        for inner, leaf in nested:
            name = f"{key}.{inner}" if inner else key
            text = "" if leaf is None else f"{leaf:.6g}" if isinstance(leaf, float) else str(leaf)
            rows.append(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>")
    return rows
