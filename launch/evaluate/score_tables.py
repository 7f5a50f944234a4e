"""Score tables: what evaluate.py shows on the terminal."""

from typing import TYPE_CHECKING

from gpt2lab.metric_names import DISTILL_ACCEPTANCE, DISTILL_GAP_CLOSED, DISTILLATION
from launch.evaluate.score_rows import INTERVAL, Figure, Interval, Row, label, score_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from gpt2lab.evaluation.acceptance import Speculation
    from gpt2lab.evaluation.teacher_student_eval import Comparison
    from launch.evaluate.score_checkpoints import Arguments, Results

MOST_COLUMNS = 4  # of models beside each other; more of them are rows
WIDEST_CELL = 16  # characters
OTHER_TEXT = (
    "Not all score the same bytes of the text, as their objectives predict other parts of it: "
    "only figures of equally many bytes can be compared."
)


def show(results: "Results", arguments: "Arguments") -> None:
    """Print every table."""
    from rich.console import Console

    console = Console()
    rows = score_rows(results, arguments.teacher, arguments.baseline)
    if len(results.checkpoints) > 1 or arguments.teacher:
        given = [*(scored.source for scored in results.checkpoints), arguments.teacher, arguments.baseline]
        for row, source in zip(rows, [source for source in given if source], strict=False):
            console.print(f"{row.name:<24} {source}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Read: {results.data}", highlight=False, markup=False, soft_wrap=True)
    names = [row.name for row in rows[: len(results.checkpoints)]]
    groups = results.checkpoints[0].score.groups
    if groups > 1:
        console.print(f"± standard error, between {groups:,} documents or groups of them.", highlight=False)
    if results.left_out is not None and results.left_out.left_out:
        console.print(results.left_out.in_words(names, results.context), highlight=False, markup=False, soft_wrap=True)
    if len({scored.score.bytes for scored in results.checkpoints}) > 1:
        console.print(OTHER_TEXT, highlight=False, markup=False, soft_wrap=True)
    comparison = results.checkpoints[0].comparison if len(results.checkpoints) == 1 else None
    # A single student's figures beside its teacher have tables of their own, with what they say.
    left_out = {*DISTILLATION, "speedup"} if comparison is not None else set()
    shown = [Row(row.name, {name: one for name, one in row.figures.items() if name not in left_out}) for row in rows]
    for table in score_tables(list(map(with_intervals, shown)), arguments.split, console.width):
        console.print(table)
    if any(scored.texts for scored in results.checkpoints):
        console.print(f"Texts: greedy answers to {arguments.texts} prompts at the most; ± standard error, bootstrap.\n")
        for line in _nothing_to_score(results) + _signatures(results):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if comparison is not None:
        _show_comparison(console.print, comparison)


def with_intervals(row: Row) -> Row:
    """The row with the 95 % interval of each difference behind it."""
    figures = dict[str, Figure]()
    for name, one in row.figures.items():
        figures[name] = one
        if "_minus_" in name and one.low is not None:
            figures[f"{name}{INTERVAL}"] = Interval(one.value, one.standard_error, one.low, one.high)
    return Row(row.name, figures)


def score_tables(rows: list[Row], split: str, width: int) -> "list[Table]":
    """Figures below each other and models side by side; the other way round where there are many models.

    Args:
        width: characters of the terminal; many models have their figures in as many tables as fit into it.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    if len(rows) <= MOST_COLUMNS:
        return [_beside_each_other(rows, names, split)]
    room = width - max(len(row.name) for row in rows) - 2
    columns = max(room // (WIDEST_CELL + 1), 1)
    return [_below_each_other(rows, names[start : start + columns], split) for start in range(0, len(names), columns)]


def _beside_each_other(rows: list[Row], names: list[str], split: str) -> "Table":
    from rich.markup import escape

    table = _plain()
    table.add_column(split)
    for row in rows:
        table.add_column(escape(row.name), justify="right", overflow="fold")
    explains = len(rows) < 3
    if explains:
        table.add_column("what it says")
    for name in names:
        words = label(name)
        table.add_row(words[0], *(_cell(row, name) for row in rows), *([words[1]] if explains else []))
    return table


def _below_each_other(rows: list[Row], names: list[str], split: str) -> "Table":
    from rich.markup import escape

    table = _plain()
    table.add_column(split, overflow="fold")
    for name in names:
        table.add_column(label(name)[0], justify="right")
    for row in rows:
        table.add_row(escape(row.name), *(_cell(row, name) for name in names))
    return table


def distillation_table(comparison: "Comparison") -> "Table":
    """The student beside its teacher; what the other tables show is left out."""
    table = _explained("The student against its teacher")
    for name, (words, says) in DISTILLATION.items():
        if name in comparison.figures and name != DISTILL_ACCEPTANCE:
            error = comparison.standard_errors.get(name)
            table.add_row(words, _with_error(comparison.figures[name], error), says)
    return table


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def speculation_table(speculation: "Speculation", expected_error: float | None = None) -> "Table":
    """What the student would be worth as the teacher's draft model.

    Args:
        expected_error: standard error of the expected acceptance, over texts.
    """
    table = _explained("The student as draft model of its teacher in speculative decoding")
    measured, error = speculation.acceptance_measured, speculation.acceptance_standard_error
    table.add_row("acceptance, expected", _with_error(speculation.acceptance, expected_error), "1 − total variation")
    table.add_row(
        "acceptance, measured", _with_error(measured, error), "of one draft at each position; ± standard error"
    )
    table.add_row("cost ratio", f"{speculation.cost_ratio:.4f}", "FLOPs of a token, student over teacher")
    table.add_row("drafts", str(speculation.drafts), "tokens best drafted at a time, of 1 to 16")
    table.add_row(
        "tokens per call",
        _with_error(speculation.tokens_per_target_call, speculation.tokens_per_target_call_standard_error),
        "expected, of the teacher",
    )
    table.add_row(
        "speed-up",
        _with_error(speculation.speedup, speculation.speedup_standard_error),
        "implied, over the teacher alone",
    )
    return table


def _show_comparison(show: "Callable[..., None]", comparison: "Comparison") -> None:
    if comparison.is_cut:
        show(f"Only the first {comparison.entries:,} entries of the vocabulary count: the rest is padding.\n")
    show(distillation_table(comparison))
    if comparison.baseline is not None and DISTILL_GAP_CLOSED not in comparison.figures:
        show("The baseline is no worse than the teacher, so there is no gap to close.\n")
    show(speculation_table(comparison.speculation, comparison.standard_errors.get(DISTILL_ACCEPTANCE)))


def _nothing_to_score(results: "Results") -> list[str]:
    """Why a figure is missing that was asked for; all models answer the same prompts."""
    texts = results.checkpoints[0].texts
    return [f"{label(name)[0]}: no reference has any." for name, one in texts.items() if one.value is None]


def _signatures(results: "Results") -> list[str]:
    """How sacreBLEU computed its figures; without them nobody can compare."""
    scores = [scored.texts for scored in results.checkpoints] + list(results.baselines.values())
    each = [f"{label(name)[0]}: {one.signature}" for texts in scores for name, one in texts.items() if one.signature]
    return list(dict.fromkeys(each))


def _cell(row: Row, name: str) -> str:
    return str(row.figures[name]) if name in row.figures else "–"


def _explained(title: str) -> "Table":
    table = _plain(title)
    table.add_column("figure")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("what it says")
    return table


def _plain(title: str | None = None) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
