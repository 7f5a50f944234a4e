"""Score tables: terminal output of evaluate.py."""

from typing import TYPE_CHECKING

from gpt2lab.metric_names import DISTILL_ACCEPTANCE, DISTILL_GAP_CLOSED, DISTILLATION
from launch.evaluate.score_rows import INTERVAL, MINUS, Figure, Interval, Row, label, score_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from gpt2lab.evaluation.teacher_student_eval import Comparison
    from launch.evaluate.score_checkpoints import Arguments, Results

MAX_MODEL_COLUMNS = 4  # with more models, each model is a row
CELL_WIDTH = 16  # characters
DIFFERENT_BYTES = (
    "Not all score the same bytes of the text, because their objectives predict other parts of it: "
    "compare only figures with the same number of bytes."
)


def print_tables(results: "Results", arguments: "Arguments") -> None:
    """Print all tables."""
    from rich.console import Console

    console = Console()
    rows = score_rows(results, arguments.teacher, arguments.baseline)
    if len(results.checkpoints) > 1 or arguments.teacher:
        given = [*(scored.source for scored in results.checkpoints), arguments.teacher, arguments.baseline]
        for row, source in zip(rows, [source for source in given if source], strict=False):
            console.print(f"{row.name:<24} {source}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Data: {results.data}", highlight=False, markup=False, soft_wrap=True)
    names = [row.name for row in rows[: len(results.checkpoints)]]
    groups = results.checkpoints[0].score.groups
    if groups > 1:
        console.print(f"± standard error, from {groups:,} documents or groups of documents.", highlight=False)
    if results.left_out is not None and results.left_out.left_out:
        console.print(results.left_out.summary(names, results.context), highlight=False, markup=False, soft_wrap=True)
    if len({scored.score.bytes for scored in results.checkpoints}) > 1:
        console.print(DIFFERENT_BYTES, highlight=False, markup=False, soft_wrap=True)
    comparison = results.checkpoints[0].comparison if len(results.checkpoints) == 1 else None
    # For a single student, separate tables show and explain the comparison with its teacher.
    hidden = {*DISTILLATION, "speedup"} if comparison is not None else set()
    shown = [Row(row.name, {name: one for name, one in row.figures.items() if name not in hidden}) for row in rows]
    for table in score_tables(list(map(with_intervals, shown)), arguments.split, console.width):
        console.print(table)
    if any(scored.texts for scored in results.checkpoints):
        texts = f"Texts: {results.sampling.label} completions of at most {arguments.texts} prompts"
        console.print(f"{texts}; ± standard error, bootstrap.\n", highlight=False, markup=False, soft_wrap=True)
        for line in _unavailable_metrics(results) + _signatures(results):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if comparison is not None:
        _show_comparison(console.print, comparison)


def with_intervals(row: Row) -> Row:
    """Add the 95 % interval after each difference."""
    figures = dict[str, Figure]()
    for name, one in row.figures.items():
        figures[name] = one
        if MINUS in name and one.low is not None:
            figures[f"{name}{INTERVAL}"] = Interval(one.value, one.standard_error, one.low, one.high)
    return Row(row.name, figures)


def score_tables(rows: list[Row], split: str, width: int) -> "list[Table]":
    """One table with a column per model; for many models, tables with a row per model.

    Args:
        width: characters of the terminal, which determine how many figures a table with a row per model has.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    if len(rows) <= MAX_MODEL_COLUMNS:
        return [_models_as_columns(rows, names, split)]
    columns = max((width - max(len(row.name) for row in rows) - 2) // (CELL_WIDTH + 1), 1)
    return [_models_as_rows(rows, names[start : start + columns], split) for start in range(0, len(names), columns)]


def _models_as_columns(rows: list[Row], names: list[str], split: str) -> "Table":
    from rich.markup import escape

    table = _plain()
    table.add_column(split)
    for row in rows:
        table.add_column(escape(row.name), justify="right", overflow="fold")
    explains = len(rows) < 3
    if explains:
        table.add_column("meaning")
    for name in names:
        title, meaning = label(name)
        table.add_row(title, *(_cell(row, name) for row in rows), *([meaning] if explains else []))
    return table


def _models_as_rows(rows: list[Row], names: list[str], split: str) -> "Table":
    from rich.markup import escape

    table = _plain()
    table.add_column(split, overflow="fold")
    for name in names:
        table.add_column(label(name)[0], justify="right")
    for row in rows:
        table.add_row(escape(row.name), *(_cell(row, name) for name in names))
    return table


def _show_comparison(show: "Callable[..., None]", comparison: "Comparison") -> None:
    """Print how the student compares with its teacher, and its figures as draft model in speculative decoding."""
    if comparison.is_truncated:
        show(f"Only the first {comparison.vocab_size:,} tokens of the vocabulary count: the rest is padding.\n")
    compared = [
        (title, _with_error(comparison.figures[name], comparison.standard_errors.get(name)), meaning)
        for name, (title, meaning) in DISTILLATION.items()
        if name in comparison.figures and name != DISTILL_ACCEPTANCE
    ]
    show(_explained_table("Student compared with its teacher", compared))
    if comparison.baseline is not None and DISTILL_GAP_CLOSED not in comparison.figures:
        show("The baseline is no worse than the teacher, so there is no gap to close.\n")
    show(_explained_table("Student as draft model of its teacher in speculative decoding", _speculation(comparison)))


def _speculation(comparison: "Comparison") -> list[tuple[str, str, str]]:
    found = comparison.speculation
    expected = _with_error(found.acceptance, comparison.standard_errors.get(DISTILL_ACCEPTANCE))
    measured = _with_error(found.acceptance_measured, found.acceptance_standard_error)
    tokens = _with_error(found.tokens_per_target_call, found.tokens_per_target_call_standard_error)
    speedup = _with_error(found.speedup, found.speedup_standard_error)
    return [
        ("acceptance, expected", expected, "1 − total variation"),
        ("acceptance, measured", measured, "one draft token per position; ± standard error"),
        ("cost ratio", f"{found.cost_ratio:.4f}", "FLOPs per token, student / teacher"),
        ("drafts", str(found.drafts), "best number of draft tokens, from 1 to 16"),
        ("tokens per call", tokens, "expected, per call of the teacher"),
        ("speed-up", speedup, "expected, compared with the teacher alone"),
    ]


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _unavailable_metrics(results: "Results") -> list[str]:
    """Messages for metrics without a value, which is so for all models, as their prompts are the same."""
    texts = results.checkpoints[0].texts
    return [f"{label(name)[0]}: no reference has any." for name, one in texts.items() if one.value is None]


def _signatures(results: "Results") -> list[str]:
    """sacreBLEU signatures, without which scores are not comparable."""
    scores = [scored.texts for scored in results.checkpoints] + list(results.baselines.values())
    each = [f"{label(name)[0]}: {one.signature}" for texts in scores for name, one in texts.items() if one.signature]
    return list(dict.fromkeys(each))


def _cell(row: Row, name: str) -> str:
    return str(row.figures[name]) if name in row.figures else "–"


def _explained_table(title: str, rows: list[tuple[str, str, str]]) -> "Table":
    """Return a table of (figure, value, meaning)."""
    table = _plain(title)
    table.add_column("figure")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("meaning")
    for row in rows:
        table.add_row(*row)
    return table


def _plain(title: str | None = None) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
