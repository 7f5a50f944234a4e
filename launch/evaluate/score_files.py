"""Score files: writes the results of evaluate.py as JSON, CSV and an HTML plot."""

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2lab.errors import InputError
from gpt2lab.metric_names import DISTILLATION
from launch.config.key_value_cli import check_output_file
from launch.evaluate.score_rows import COUNTS, Row, differences, direction, label, score_rows

if TYPE_CHECKING:
    from gpt2lab.evaluation.bootstrap import TextScore
    from launch.evaluate.score_checkpoints import Arguments, Results, Scored


def check(arguments: "Arguments") -> None:
    """Check before the evaluation that the output files can be written.

    Raises:
        InputError: a file cannot be written.
    """
    if arguments.plot and Path(arguments.plot).suffix not in (".html", ".htm"):
        raise InputError(f"plot={arguments.plot}: the plot is an HTML page.\nGive a file that ends in .html.")
    for key in ("json", "csv", "plot"):
        check_output_file(vars(arguments)[key], key)


def write(results: "Results", arguments: "Arguments") -> None:
    """Write the files given by `json`, `csv` and `plot`."""
    from gpt2lab.storage.atomic_files import write_json, write_text

    rows = score_rows(results, arguments.teacher, arguments.baseline)
    if arguments.json:
        write_json(Path(arguments.json), to_json(results, arguments))
    if arguments.csv:
        write_text(Path(arguments.csv), to_csv(rows))
    if arguments.plot:
        from gpt2lab.reports.scores_html import Bar, Panel, render

        names = dict.fromkeys(name for row in rows for name in row.figures)
        panels = [
            Panel(
                *label(name), direction(name), [Bar(row.name, *_ends(row, name)) for row in rows if name in row.figures]
            )
            for name in names
            if name not in COUNTS
        ]
        write_text(Path(arguments.plot), render(", ".join(row.name for row in rows), panels))


def _ends(row: Row, name: str) -> tuple[float, float, float]:
    return row.figures[name].value, *row.figures[name].bounds


def to_json(results: "Results", arguments: "Arguments") -> dict[str, Any] | list[dict[str, Any]]:
    """Return a JSON object for one checkpoint, a list of objects for several."""
    objects = [_to_object(scored, arguments) for scored in results.checkpoints]
    if results.left_out is not None:
        skipped = results.left_out
        for content, count in zip(objects, skipped.too_long, strict=True):
            content["pairs"] = {"in_all": skipped.pairs, "left_out": skipped.left_out, "too_long_for_this": count}
    for content in objects:
        content |= {"sampling": results.sampling.label} if "texts" in content else {}
    if results.baselines:
        answers = {name: _as_objects(scores) for name, scores in results.baselines.items()}
        for content in objects:
            content["baselines"] = answers
    return objects[0] if len(objects) == 1 else objects


def to_csv(rows: list[Row]) -> str:
    """Return a table with one row per model; columns: figures, standard errors, sacreBLEU signatures."""
    names = dict.fromkeys(name for row in rows for name in row.figures)
    columns = ["model"]
    for name in names:
        figures = [row.figures[name] for row in rows if name in row.figures]
        columns.append(name)
        columns += [f"{name}_standard_error"] if any(one.standard_error is not None for one in figures) else []
        columns += [f"{name}_signature"] if any(one.signature for one in figures) else []
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells: dict[str, str | float] = {"model": row.name}
        for name, figure in row.figures.items():
            cells[name] = figure.value
            if figure.standard_error is not None:
                cells[f"{name}_standard_error"] = figure.standard_error
            if figure.signature:
                cells[f"{name}_signature"] = figure.signature
        writer.writerow(cells)
    return text.getvalue()


def _to_object(scored: "Scored", arguments: "Arguments") -> dict[str, Any]:
    """JSON object of a checkpoint, with its own score at the top level."""
    content: dict[str, Any] = {"source": scored.source, **scored.score.facts}
    comparison = scored.comparison
    if comparison is not None:
        content["vocab_entries"] = comparison.vocab_size
        for key, score in (("teacher", comparison.teacher), ("baseline", comparison.baseline)):
            if score is not None:
                content[key] = {"source": vars(arguments)[key], **score.facts}
        content |= {name: comparison.figures[name] for name in DISTILLATION if name in comparison.figures}
        errors = {name: error for name, error in comparison.standard_errors.items() if name in content}
        content["standard_errors"] = {**scored.score.standard_errors, **errors}
        content["speculative_decoding"] = asdict(comparison.speculation)
    for name, found in differences(scored).items():
        content[name] = asdict(found)
    if scored.texts:
        content["texts"] = _as_objects(scored.texts)
        content["texts_minus"] = {
            answer: {name: asdict(one) for name, one in scores.items()}
            for answer, scores in scored.minus_answers.items()
        }
    if scored.speeds:
        content["decoding"] = [asdict(speed) for speed in scored.speeds]
    if scored.zero_shot:
        content["zero_shot"] = {
            name: {"value": value, "standard_error": error} for name, (value, error) in scored.zero_shot.items()
        }
    return content


def _as_objects(scores: "dict[str, TextScore]") -> dict[str, Any]:
    return {name: asdict(score) for name, score in scores.items()}
