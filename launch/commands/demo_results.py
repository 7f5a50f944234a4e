"""Results of the demo: table of its models, differences paired by document, summaries, samples side by side."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt2lab.evaluation.document_losses import loss_difference, read_document_losses, share_of_gap
from gpt2lab.reports.run_texts import read_examples
from gpt2lab.reports.samples_jsonl import Sample, read_samples
from gpt2lab.storage.report_json import read_report
from launch.commands.demo_stages import (
    DISTILLED,
    FINETUNED,
    FROM_LAYERS,
    RUNNING_TEXT,
    SCORES_FILE,
    SCRATCH,
    STUDENTS,
    TEACHER,
    best_student,
)
from launch.distributed.child_processes import IS_CHECKOUT
from launch.evaluate.score_rows import label

COMPARED = ((DISTILLED, SCRATCH), (FROM_LAYERS, SCRATCH), (FROM_LAYERS, DISTILLED), (FROM_LAYERS, TEACHER))
SHOWN_PROMPTS, SHOWN_EXAMPLES = 2, 3
SHOWN_LINES = 12  # of a sample
WIDE = 78  # columns of a terminal in which the whole table fits
SPLIT_NOTE = (
    "The intervals cover validation documents, not seeds; for seeds run python train.py experiment=distill_study."
)


@dataclass(frozen=True)
class Answers:
    """Scores of the fine-tuned student's summaries and of answers without a model, from scores.json.

    Attributes:
        rows: (whose, score ± error, fine-tuned minus it with its 95 % interval or "").
        metric: name of the score.
    """

    rows: list[tuple[str, str, str]]
    metric: str


def results_rows(folder: Path, names: Sequence[str]) -> list[dict[str, str]]:
    """Return one row of figures as text per stage that has a report."""
    losses = {name: read_document_losses(folder / name) for name in RUNNING_TEXT}
    rows = []
    for name in names:
        report = read_report(folder / name)
        share = share_of_gap(losses[name], losses[SCRATCH], losses[TEACHER]) if name in STUDENTS else None
        rows.append(
            {
                "stage": name,
                "model": _model(report),
                "loss": _number(report.get("val_loss"), ".3f"),
                "± docs": _number(report.get("val_loss_error"), ".3f"),
                "gap closed": "" if share is None else f"{share[0]:.0%} ± {share[1] or 0:.0%}".replace("%", " %"),
                "bits/byte": _number(report.get("bits_per_byte"), ".3f"),
                "tokens/s": _number(report.get("tokens_per_second"), ",.0f"),
                "seconds": _number(report.get("seconds"), ".0f"),
            }
        )
    return rows


def results_table(rows: Sequence[dict[str, str]], width: int) -> Table:
    """Return the table for the terminal, on a narrow one without what follows from other columns."""
    left_out = () if width >= WIDE else ("bits/byte", "tokens/s")
    table = Table(title="Trained models", box=SIMPLE_HEAD, padding=0, title_justify="left")
    columns = [column for column in rows[0] if column not in left_out]
    for column in columns:
        table.add_column(column, justify="left" if column in ("stage", "model") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    return table


def comparison(folder: Path) -> list[str]:
    """Format the differences in loss between the models of running text that have ended, paired by document."""
    reports = {name: read_report(folder / name) for name in RUNNING_TEXT}
    lines = []
    for first, second in COMPARED:
        ours, theirs = (reports[name].get("val_loss") for name in (first, second))
        if ours is None or theirs is None:
            continue
        found = loss_difference(*(read_document_losses(folder / name) for name in (first, second)))
        difference = f"{ours - theirs:+.4f} nats".replace("-", "−") if found is None else str(found)
        lines.append(f"{first} − {second}: {difference}")
    return lines


def summary_scores(folder: Path) -> Answers | None:
    """Return the scores of the summaries; None before they are scored."""
    file = folder / SCORES_FILE
    if not file.is_file():
        return None
    scores: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    metric, own = next(iter(scores["texts"].items()))
    rows = [(FINETUNED, _with_error(own), "")]
    for name, answer in scores["baselines"].items():
        minus = scores["texts_minus"][name][metric]
        interval = f" ({minus['low']:+.1f} … {minus['high']:+.1f})" if minus["low"] is not None else ""
        rows.append((name, _with_error(answer[metric]), f"{minus['value']:+.1f}{interval}".replace("-", "−")))
    return Answers(rows, metric)


def _with_error(score: dict[str, Any]) -> str:
    error = f" ± {score['standard_error']:.1f}" if score["standard_error"] is not None else ""
    return f"{score['value']:.1f}{error}"


def score_rows(answers: Answers) -> list[tuple[str, str, str]]:
    """Return the rows of the table of summaries, the head first."""
    return [("summary", label(answers.metric)[0], f"{FINETUNED} minus it, 95 % interval"), *answers.rows]


def print_summary_scores(answers: Answers, console: Console) -> None:
    """Print the scores of the fine-tuned model beside those of answers without a model."""
    head, *rows = score_rows(answers)
    table = Table(title="Summaries, paired by document", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def sample_columns(folder: Path, method: str = "nucleus") -> dict[str, dict[str, str]]:
    """Return the newest samples of teacher, best student and scratch: prompt → stage → text."""
    found = {name: _newest(read_samples(folder / name), method) for name in (TEACHER, best_student(folder), SCRATCH)}
    found = {name: texts for name, texts in found.items() if texts}
    prompts = [prompt for prompt in next(iter(found.values()), {}) if all(prompt in texts for texts in found.values())]
    return {prompt: {name: texts[prompt] for name, texts in found.items()} for prompt in prompts}


def _newest(samples: Sequence[Sample], method: str) -> dict[str, str]:
    """Return prompt → completion of the last step."""
    return {sample.prompt: sample.completion for sample in samples if sample.method.startswith(method)}


def print_samples(folder: Path, console: Console) -> None:
    """Print the continuations of a few prompts, a column per model."""
    for prompt, texts in list(sample_columns(folder).items())[:SHOWN_PROMPTS]:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), expand=True)
        console.rule("nucleus samples after this prompt", style="dim")
        console.print(prompt.rstrip("\n"), style="bold", markup=False, highlight=False)
        for name in texts:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*(_shortened(text) for text in texts.values()))
        console.print(table)


def _shortened(text: str) -> Text:
    lines = text.strip("\n").splitlines()
    return Text("\n".join(lines[:SHOWN_LINES]) + "\n…" * (len(lines) > SHOWN_LINES))


def print_examples(folder: Path, console: Console) -> None:
    """Print summaries of the fine-tuned student beside the docstrings."""
    console.rule("summaries by the fine-tuned student", style="dim")
    for one in read_examples(folder / FINETUNED)[:SHOWN_EXAMPLES]:
        console.print(one.prompt.strip().splitlines()[0], style="bold", markup=False, highlight=False)
        console.print(f"  student    {one.output.strip() or '(empty)'}", markup=False, highlight=False)
        console.print(f"  docstring  {one.reference.strip()}", markup=False, highlight=False)


def next_commands(folder: Path, student: str) -> dict[str, str]:
    """Return commands that use the models, by what they show.

    Args:
        folder: of the demo, as in commands.
        student: the best one.
    """
    generate = "generate.py" if IS_CHECKOUT else "-m gpt2lab_scripts.generate"
    teacher, draft = (shlex.quote(str(folder / name)) for name in (TEACHER, student))
    prompt = 'prompt="def add(a, b):"'
    own = "make demo DATA=docs" if IS_CHECKOUT else "python -m launch.commands.demo path=FOLDER"
    return {
        "Playground: teacher and student write side by side in the browser": (
            f"python {generate} checkpoint={teacher} draft={draft} serve=true"
        ),
        "Inspection: token losses and attention maps on one page": (
            f"python {generate} checkpoint={draft} teacher={teacher} {prompt} inspect=true"
        ),
        "Speculative decoding: the student drafts, the teacher verifies": (
            f"python {generate} checkpoint={teacher} draft={draft} {prompt} max_new_tokens=64"
        ),
        "Own data: your file or folder in place of docs": own,
    }


def _model(report: Mapping[str, Any]) -> str:
    parameters = report.get("parameters")
    return f"{report.get('model', '')} {parameters / 1e6:.1f}M" if parameters else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None or not math.isfinite(value) else format(value, form)
