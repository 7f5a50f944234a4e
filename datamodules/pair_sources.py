"""Where pairs come from: functions in Python source, gettext catalogues, tables in files, datasets of the Hub.

Every source gives rows (dictionaries of columns) and an identity that changes whenever its rows would.
"""

import csv
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.catalogue_pairs import catalogue_files, catalogue_rows
from datamodules.documents import (
    COMPRESSED_ENDINGS,
    RECORD_ENDINGS,
    file_records,
    files_identity,
    find_files,
    kind_of,
    opened,
    stdlib_corpus,
)
from datamodules.function_pairs import function_rows
from datamodules.hub_documents import load_hub_split
from gpt2lab.errors import InputError

log = logging.getLogger(__name__)

DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLE_ENDINGS = frozenset(RECORD_ENDINGS | set(DELIMITERS))
Row = dict[str, Any]
FILE = "file"  # column with the source file of a row, where it is recorded; pairs of one file are not independent


@dataclass(frozen=True)
class PairSource:
    identity: dict[str, Any]  # JSON-able; together with the chosen columns it is the key of the prepared pairs
    rows: Callable[[], Iterator[Row]]


def pair_text(row: Row, column: str) -> str:
    """The text of a column, `a.b` for b within a, `a+b` for the non-empty ones of a and b with an empty line between.

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
    """What `path` holds, read the way `reader` says: functions, catalogues or tables.

    A table given to any reader is read as a table. Without `path`, functions are those of the standard library and
    catalogues those of the system.

    Raises:
        InputError: nothing there, or nothing of that kind.
    """
    if reader == "functions" and not (path and _is_table(path)):
        return _functions(path)
    if reader == "catalogues" and not (path and _is_table(path)):
        files = catalogue_files(path, language)
        return PairSource({"catalogues": files_identity(files), "format": 2}, lambda: _catalogue_rows(files))
    return open_tables(path, "path", on_bad_line, columns)


def open_hub_source(dataset: str, config: str, revision: str, split: str) -> PairSource:
    """A split of a data set of the Hub, or of a local folder that `datasets` reads."""
    rows = load_hub_split(dataset, config, split, streaming=False, revision=revision)
    identity = {"dataset": dataset, "config": config, "split": split, "fingerprint": rows._fingerprint}
    return PairSource(identity, lambda: iter(rows))


def _is_table(path: str) -> bool:
    return Path(path).suffix in COMPRESSED_ENDINGS or kind_of(Path(path), TABLE_ENDINGS) is not None


def _functions(path: str) -> PairSource:
    if not path:
        corpus = stdlib_corpus()
        return PairSource(corpus.identity, lambda: _function_rows((one.key, one.text) for one in corpus.documents()))
    files = find_files(path, "path", frozenset({".py"}))
    return PairSource(
        {"functions": files_identity(files)},
        lambda: _function_rows((str(file), _text_of(file)) for file in files),
    )


def _function_rows(sources: Iterable[tuple[str, str]]) -> Iterator[Row]:
    """Rows of the functions in (file, text), each with its file."""
    for file, text in sources:
        for row in function_rows([text]):
            yield {**row, FILE: file}


def _catalogue_rows(files: list[Path]) -> Iterator[Row]:
    """Rows of the catalogues, each with its file."""
    seen: set[bytes] = set()
    for file in files:
        for row in catalogue_rows([file], seen):
            yield {**row, FILE: str(file)}


def _text_of(file: Path) -> str:
    with opened(file) as stream:
        return stream.read().decode("utf-8", errors="replace")


def open_tables(path: str, key: str, on_bad_line: str, columns: tuple[str, str]) -> PairSource:
    """Rows of .jsonl, .parquet, .csv and .tsv files, each also as .gz or .zst; `key` is what the user gave the path as.

    Columns that are both numbers stand for places, counted from 1, in a .csv or .tsv without a header.

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
            if kind_of(file, TABLE_ENDINGS) in DELIMITERS:
                yield from _delimited_rows(file, on_bad_line, header)
            else:
                yield from (row for _, row in file_records(file, on_bad_line))

    return PairSource({"tables": files_identity(files), "header": header, "on_bad_line": on_bad_line}, rows)


def _delimited_rows(file: Path, on_bad_line: str, header: bool) -> Iterator[Row]:
    """Rows of a .csv (quoted as spreadsheets do) or .tsv (never quoted); columns 1, 2, … where there is no header.

    Raises:
        InputError: a line has not as many fields as the first, and `on_bad_line` is stop.
    """
    delimiter = DELIMITERS[kind_of(file, TABLE_ENDINGS) or ""]
    csv.field_size_limit(2**31 - 1)  # articles are longer than the default of 128 Ki characters
    names: list[str] = []
    skipped = 0
    with opened(file) as stream:
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
                    "Mend the line, or leave such lines out: on_bad_line=skip"
                )
            else:
                skipped += 1
    if skipped:
        log.warning("%s: %d broken lines left out", file, skipped)
