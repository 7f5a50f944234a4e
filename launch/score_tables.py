"""Score tables: what evaluate.py shows on the terminal and writes as JSON."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gpt2lab.metric_names import DISTILL_ACCEPTANCE, DISTILL_TEACHER_LOSS, DISTILLATION

if TYPE_CHECKING:
    from rich.table import Table

    from gpt2lab.acceptance import Speculation
    from gpt2lab.comparison import Comparison
    from gpt2lab.evaluation import Score


def as_json(score: "Score", comparison: "Comparison | None", sources: dict[str, str]) -> dict[str, Any]:
    """The checkpoint's own score at the top; beside it, with a teacher, everything of the comparison.

    Args:
        sources: what teacher= and baseline= named.
    """
    content: dict[str, Any] = asdict(score)
    if comparison is None:
        return content
    content["vocab_entries"] = comparison.entries
    for key, of_model in (("teacher", comparison.teacher), ("baseline", comparison.baseline)):
        if of_model is not None:
            content[key] = {"source": sources[key], **asdict(of_model)}
    figures = {name: comparison.figures[name] for name in DISTILLATION if name in comparison.figures}
    return {**content, **figures, "speculative_decoding": asdict(comparison.speculation)}


def score_table(rows: list[tuple[str, "Score"]], first: str, split: str) -> "Table":
    """One row for each (name, score); `first` heads the names."""
    from rich.table import Table

    table = Table()
    table.add_column(first, overflow="fold")
    table.add_column("split")
    for column in asdict(rows[0][1]):
        table.add_column(column.replace("_", " "), justify="right")
    for name, score in rows:
        numbers = [f"{value:,}" if key == "tokens" else f"{value:.4f}" for key, value in asdict(score).items()]
        table.add_row(name, split, *numbers)
    return table


def distillation_table(figures: dict[str, float]) -> "Table":
    """The student beside its teacher; what the other tables show is left out."""
    table = _explained("The student against its teacher")
    for name, (label, says) in DISTILLATION.items():
        if name in figures and name not in (DISTILL_TEACHER_LOSS, DISTILL_ACCEPTANCE):
            table.add_row(label, f"{figures[name]:.4f}", says)
    return table


def speculation_table(speculation: "Speculation") -> "Table":
    """What the student would be worth as the teacher's draft model."""
    table = _explained("The student as draft model of its teacher in speculative decoding")
    measured, error = speculation.acceptance_measured, speculation.acceptance_standard_error
    table.add_row("acceptance, expected", f"{speculation.acceptance:.4f}", "1 − total variation")
    table.add_row(
        "acceptance, measured", f"{measured:.4f} ± {error:.4f}", "of one draft at each position; ± standard error"
    )
    table.add_row("cost ratio", f"{speculation.cost_ratio:.4f}", "FLOPs of a token, student over teacher")
    table.add_row("drafts", str(speculation.drafts), "tokens best drafted at a time, of 1 to 16")
    table.add_row("tokens per call", f"{speculation.tokens_per_target_call:.2f}", "expected, of the teacher")
    table.add_row("speed-up", f"{speculation.speedup:.2f}", "implied, over the teacher alone")
    return table


def _explained(title: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("figure")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("what it says")
    return table
