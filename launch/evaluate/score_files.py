"""Score files: what evaluate.py writes where it is asked to — JSON, a table as CSV, a plot as a page."""

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2lab.errors import InputError
from gpt2lab.metric_names import DISTILLATION
from launch.config.key_value_cli import check_output_file
from launch.evaluate.score_rows import COUNTED, Row, differences, label, score_rows

if TYPE_CHECKING:
    from launch.evaluate.score_checkpoints import Arguments, Results, Scored


def check(arguments: "Arguments") -> None:
    """Find out before the work, not after it, that a result cannot be written.

    Raises:
        InputError: names the file.
    """
    if arguments.plot and Path(arguments.plot).suffix not in (".html", ".htm"):
        raise InputError(f"plot={arguments.plot}: the plot is a page.\nName a file that ends in .html.")
    for key in ("json", "csv", "plot"):
        check_output_file(vars(arguments)[key], key)


def write(results: "Results", arguments: "Arguments") -> None:
    """Write the files that the arguments name."""
    from gpt2lab.storage.atomic_files import write_json, write_text

    rows = score_rows(results, arguments.teacher, arguments.baseline)
    if arguments.json:
        write_json(Path(arguments.json), as_json(results, arguments))
    if arguments.csv:
        write_text(Path(arguments.csv), as_csv(rows))
    if arguments.plot:
        from gpt2lab.reports.scores_html import Bar, render

        names = dict.fromkeys(name for row in rows for name in row.figures)
        panels = {
            label(name): [
                Bar(row.name, row.figures[name].value, *row.figures[name].bounds) for row in rows if name in row.figures
            ]
            for name in names
            if name not in COUNTED
        }
        write_text(Path(arguments.plot), render(", ".join(row.name for row in rows), panels))


def as_json(results: "Results", arguments: "Arguments") -> dict[str, Any] | list[dict[str, Any]]:
    """Of one checkpoint an object, of several a list of such."""
    objects = [_as_object(scored, arguments) for scored in results.checkpoints]
    if results.left_out is not None:
        one = results.left_out
        for content, count in zip(objects, one.too_long, strict=True):
            content["pairs"] = {"in_all": one.pairs, "left_out": one.left_out, "too_long_for_this": count}
    if results.baselines:
        answers = {
            name: {metric: asdict(score) for metric, score in scores.items()}
            for name, scores in results.baselines.items()
        }
        for content in objects:
            content["baselines"] = answers
    return objects[0] if len(objects) == 1 else objects


def as_csv(rows: list[Row]) -> str:
    """A model a row; each figure, and beside it its standard error and sacreBLEU's signature where it has them."""
    names = dict.fromkeys(name for row in rows for name in row.figures)
    columns = ["model"]
    for name in names:
        those = [row.figures[name] for row in rows if name in row.figures]
        columns.append(name)
        columns += [f"{name}_standard_error"] if any(one.standard_error is not None for one in those) else []
        columns += [f"{name}_signature"] if any(one.signature for one in those) else []
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


def _as_object(scored: "Scored", arguments: "Arguments") -> dict[str, Any]:
    """The checkpoint's own score at the top; beside it everything else that was asked for."""
    content: dict[str, Any] = {"source": scored.source, **scored.score.facts}
    comparison = scored.comparison
    if comparison is not None:
        content["vocab_entries"] = comparison.entries
        for key, of_model in (("teacher", comparison.teacher), ("baseline", comparison.baseline)):
            if of_model is not None:
                content[key] = {"source": vars(arguments)[key], **of_model.facts}
        content |= {name: comparison.figures[name] for name in DISTILLATION if name in comparison.figures}
        errors = {name: error for name, error in comparison.standard_errors.items() if name in content}
        content["standard_errors"] = {**scored.score.standard_errors, **errors}
        content["speculative_decoding"] = asdict(comparison.speculation)
    for name, found in differences(scored).items():
        content[name] = asdict(found)
    if scored.texts:
        content["texts"] = {name: asdict(score) for name, score in scored.texts.items()}
    if scored.speeds:
        content["decoding"] = [asdict(speed) for speed in scored.speeds]
    if scored.zero_shot:
        content["zero_shot"] = {
            name: {"value": value, "standard_error": error} for name, (value, error) in scored.zero_shot.items()
        }
    return content
