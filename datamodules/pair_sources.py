"""Sources of pairs: functions in Python source, gettext catalogues, tables in files, data sets on the Hub.

Every source has rows (dictionaries of columns) and an identity that changes when its rows change.
"""

import csv
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.catalogue_pairs import catalogue_files, catalogue_rows
from datamodules.documents import (
    COMPRESSED_ENDINGS,
    RECORD_ENDINGS,
    file_ending,
    file_records,
    files_identity,
    find_files,
    open_decompressed,
    stdlib_corpus,
)
from datamodules.function_pairs import function_rows
from datamodules.hub_documents import load_hub_split
from gpt2lab.errors import InputError

log = logging.getLogger(__name__)

DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLE_ENDINGS = frozenset(RECORD_ENDINGS | set(DELIMITERS))
Row = dict[str, Any]
FILE = "file"  # optional column with the source file of a row; pairs of one file are not independent


@dataclass(frozen=True)
class PairSource:
    identity: dict[str, Any]  # JSON value; with the chosen columns the cache key of the prepared pairs
    rows: Callable[[], Iterator[Row]]


def pair_text(row: Row, column: str) -> str:
    """Return the text of a column: `a.b` is b within a, `a+b` joins the non-empty ones with an empty line.

    Raises:
        KeyError: there is no such column.
    """
    if column in row:
        return "" if row[column] is None else str(row[column])
    if "+" in column:
        texts = [pair_text(row, part.strip()) for part in column.split("+")]
        return "\n\n".join(text for text in texts if text.strip())
    outer, _, inner = column.partition(".")
    if inner and isinstance(row.get(outer), dict):
        return pair_text(row[outer], inner)
    raise KeyError(column)


def open_pair_source(reader: str, path: str, language: str, on_bad_line: str, columns: tuple[str, str]) -> PairSource:
    """Open `path` with a reader: functions, catalogues or tables.

    A table is recognised by any reader. Without `path`, functions are those of the standard library and catalogues
    those of the system.

    Raises:
        InputError: no such path, or no file for this reader.
    """
    if reader == "functions" and not (path and _is_table(path)):
        return _functions(path)
    if reader == "catalogues" and not (path and _is_table(path)):
        files = catalogue_files(path, language)
        return PairSource({"catalogues": files_identity(files), "format": 2}, lambda: catalogue_rows(files))
    return open_tables(path, "path", on_bad_line, columns)


def open_hub_source(dataset: str, config: str, revision: str, split: str) -> PairSource:
    """Open a split of a data set on the Hub or in a local folder."""
    rows = load_hub_split(dataset, config, split, streaming=False, revision=revision)
    identity = {"dataset": dataset, "config": config, "split": split, "fingerprint": rows._fingerprint}
    return PairSource(identity, lambda: iter(rows))


def _is_table(path: str) -> bool:
    return Path(path).suffix in COMPRESSED_ENDINGS or file_ending(Path(path), TABLE_ENDINGS) is not None


def _functions(path: str) -> PairSource:
    if not path:
        corpus = stdlib_corpus()
        documents = corpus.documents
        return PairSource(
            corpus.identity, lambda: ({**row, FILE: one.key} for one in documents() for row in function_rows(one.text))
        )
    files = find_files(path, "path", frozenset({".py"}))
    return PairSource(
        {"functions": files_identity(files)},
        lambda: ({**row, FILE: str(file)} for file in files for row in function_rows(_read_text(file))),
    )


def _read_text(file: Path) -> str:
    with open_decompressed(file) as stream:
        return stream.read().decode("utf-8", errors="replace")


def open_tables(path: str, key: str, on_bad_line: str, columns: tuple[str, str]) -> PairSource:
    """Open .jsonl, .parquet, .csv and .tsv files, each also as .gz or .zst.

    If both columns are numbers, a .csv or .tsv has no header and they are positions counted from 1.

    Args:
        key: configuration key of the path, for messages.

    Raises:
        InputError: no path, or no such file.
    """
    if not path:
        raise InputError(
            "data=pairs needs path=FILE (.jsonl .csv .tsv .parquet) or data.dataset=HUB_ID, for example:\n"
            "data=pairs path=pairs.jsonl source=question target=answer"
        )
    files = find_files(path, key, TABLE_ENDINGS)
    header = not all(column.isdigit() for column in columns)

    def rows() -> Iterator[Row]:
        for file in files:
            if file_ending(file, TABLE_ENDINGS) in DELIMITERS:
                yield from _delimited_rows(file, on_bad_line, header)
            else:
                yield from (row for _, row in file_records(file, on_bad_line))

    return PairSource({"tables": files_identity(files), "header": header, "on_bad_line": on_bad_line}, rows)


def _delimited_rows(file: Path, on_bad_line: str, header: bool) -> Iterator[Row]:
    """Yield rows of a .csv (quoted as in spreadsheets) or .tsv (never quoted); columns 1, 2, … without a header.

    Raises:
        InputError: a line has another number of fields than the first, and `on_bad_line` is stop.
    """
    delimiter = DELIMITERS[file_ending(file, TABLE_ENDINGS) or ""]
    csv.field_size_limit(2**31 - 1)  # articles are longer than the default of 128 Ki characters
    names: list[str] = []
    skipped = 0
    with open_decompressed(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
        reader = csv.reader(
            text, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        )
        for fields in reader:
            if not fields:
                continue
            if not names:
                names = fields if header else [str(number) for number in range(1, len(fields) + 1)]
                if header:
                    continue
            if len(fields) == len(names):
                yield dict(zip(names, fields, strict=True))
            elif on_bad_line == "stop":
                raise InputError(
                    f"{file}:{reader.line_num}: {len(fields)} fields, but the first line has {len(names)}.\n"
                    "Fix the line, or skip such lines: on_bad_line=skip"
                )
            else:
                skipped += 1
    if skipped:
        log.warning("%s: skipped %d invalid lines", file, skipped)
