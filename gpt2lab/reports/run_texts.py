"""Texts of a run: samples by step, and validation examples as input, output, reference and score."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from gpt2lab.number_format import significant
from gpt2lab.reports.samples_jsonl import Sample
from gpt2lab.storage.atomic_files import write_text

FILE = "val_examples.json"
SHOWN_STEPS = 12  # sampled steps on the page, evenly spaced, the newest included
LONG_PROMPT = 240  # characters; a longer one is folded
SHOWN_EXAMPLES = 6  # before the rest is folded
MOST_LINES = 14  # of a generated text; the rest is folded
REPEATED = re.compile(r"^(([^\n]*)\n)\1{3,}", re.MULTILINE)  # a line at least four times in a row


@dataclass(frozen=True)
class Example:
    """One validation pair with the text generated for it; `score` is that of the metric, None without one per text."""

    prompt: str
    output: str
    reference: str
    metric: str
    score: float | None


def write_examples(run_dir: str | Path, examples: Sequence[Example]) -> None:
    """Write the examples of the validation that the report shows."""
    text = json.dumps([asdict(example) for example in examples], ensure_ascii=False, indent=1)
    write_text(Path(run_dir) / FILE, text + "\n")


def read_examples(run_dir: str | Path) -> list[Example]:
    """Read the examples of the last validation; empty if there are none, or if the file is damaged."""
    try:
        content = json.loads((Path(run_dir) / FILE).read_text(encoding="utf-8"))
        found = [Example(**one) for one in content]
    except (OSError, ValueError, TypeError, RecursionError):
        return []
    texts = (text for one in found for text in (one.prompt, one.output, one.reference, one.metric))
    scores = (one.score for one in found if one.score is not None)
    is_valid = all(isinstance(text, str) for text in texts) and all(isinstance(score, int | float) for score in scores)
    return found if is_valid else []


def examples_html(examples: Sequence[Example]) -> str:
    """Render the examples, all but the first few folded; empty without one."""
    shown, folded = map(_pairs, (examples[:SHOWN_EXAMPLES], examples[SHOWN_EXAMPLES:]))
    more = f"<details><summary>{len(examples) - SHOWN_EXAMPLES} more</summary>{folded}</details>" if folded else ""
    return shown + more


def _pairs(examples: Sequence[Example]) -> str:
    return "".join(
        '<div class="pair"><dl>'
        f'<dt>input</dt><dd class="prompt">{_folded(one.prompt)}</dd>'
        f'<dt>output</dt><dd class="answer">{_shortened(one.output.strip()) or "(empty)"}</dd>'
        f"<dt>reference</dt><dd>{_shortened(one.reference.strip())}</dd>"
        + (f"<dt>{escape(one.metric)}</dt><dd>{significant(one.score)}</dd>" if one.score is not None else "")
        + "</dl></div>"
        for one in examples
    )


def samples_html(samples: Sequence[Sample]) -> str:
    """Render the samples by step, the newest open."""
    steps = sorted({sample.step for sample in samples}, reverse=True)
    if not steps:
        return "<p>No samples were written.</p>"
    shown = steps[:: -(-len(steps) // SHOWN_STEPS)]
    parts = []
    for step in shown:
        texts = "".join(_sample(sample) for sample in samples if sample.step == step)
        opened = " open" * (step == steps[0])
        parts.append(f'<details{opened}><summary>step {step:,}</summary><div class="texts">{texts}</div></details>')
    left_out = len(steps) - len(shown)
    return "".join(parts) + (f"<p>{left_out} more steps are in samples.jsonl.</p>" if left_out else "")


def _sample(sample: Sample) -> str:
    prompt = f'<span class="prompt">{_folded(sample.prompt)}</span>'
    return f"<div><small>{escape(sample.method)}</small><pre>{prompt}{_shortened(sample.written)}</pre></div>"


def _shortened(text: str) -> str:
    """Render a generated text; repeated lines are shown once with their number, the end of a tall text is folded."""
    parts, start = [], 0
    for found in REPEATED.finditer(text):
        times = len(found[0]) // len(found[1])
        parts += [escape(text[start : found.start(0)]), escape(found[2]), f'<i class="times"> ↵ {times} times</i>\n']
        start = found.end(0)
    lines = "".join([*parts, escape(text[start:])]).split("\n")
    if len(lines) <= MOST_LINES + 1:
        return "\n".join(lines)
    head, tail = "\n".join(lines[:MOST_LINES]), "\n".join(lines[MOST_LINES:])
    return f"{head}\n<details><summary>… {len(lines) - MOST_LINES:,} more lines</summary>{tail}</details>"


def _folded(text: str) -> str:
    """Render a text, the beginning of a long one folded."""
    if len(text) <= LONG_PROMPT:
        return escape(text)
    head, tail = escape(text[:-LONG_PROMPT]), escape(text[-LONG_PROMPT:])
    return f"<details><summary>… {len(text) - LONG_PROMPT:,} characters before</summary>{head}</details>{tail}"
