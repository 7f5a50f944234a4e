"""Records of .jsonl, .csv, .tsv, .parquet and .txt files and of Arrow tables, with their line or row numbers."""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from datamodules import records
from datamodules.compressed_files import COMPRESSED_ENDINGS, open_decompressed, plain_ending
from datamodules.delimited_records import DELIMITERS, Lines, delimited_records
from datamodules.records import (
    Convert,
    Labels,
    RecordFault,
    Records,
    Row,
    ambiguous_columns,
    label_names,
    sound_records,
    unchanged,
    with_label_names,
)
from datamodules.text_decoding import open_text
from gpt2lab.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

DROPPED = 2**16  # characters that are read at a time of a line above the maximum size
UNREADABLE = (ValueError, OverflowError, LookupError)  # errors of a value: invalid UTF-8, a date, a time zone
ROWS = 256  # rows of an Arrow table that are Python objects at a time


def file_records(
    file: Path,
    on_bad_line: str,
    convert: Convert[Any] = unchanged,
    header: bool = True,
    labels: Labels | None = None,
) -> Iterator[Any]:
    """Yield the converted records of a file; those of a .txt file are its lines, in a column `text`.

    Args:
        header: whether the first line of a .csv or .tsv file names the columns; else they are 1, 2, …
        labels: names of labels that are numbers in the file, besides those that a .parquet file contains.

    Raises:
        InputError: the file is unreadable, or a record has a fault and `on_bad_line` is not skip.
    """
    ending, name = plain_ending(file), str(file)
    if ending == ".parquet":
        found = _parquet_records(file)
    elif ending in DELIMITERS:
        found = delimited_records(_lines(file, ""), name, DELIMITERS[ending], header)
    else:
        found = _parsed_lines(_lines(file, "\n"), _json_row if ending == ".jsonl" else _text_row)
    yield from sound_records(name, found, on_bad_line, convert, labels, "rows" if ending == ".parquet" else "lines")


def _lines(file: Path, newline: str) -> Lines:
    r"""Yield the lines of a file, which end with `\n`, or with newline="" also with `\r`.

    A line above the maximum size of a record is a fault, and is never in memory as a whole.
    """
    ends = ("\n",) if newline else ("\n", "\r")
    with open_text(file, newline, records=True) as text:
        for number in itertools.count(1):
            line = text.readline(records.RECORD_BYTES + 1)
            if not line:
                return
            if len(line) * 4 <= records.RECORD_BYTES or len(line.encode("utf-8", "replace")) <= records.RECORD_BYTES:
                yield number, line
                continue
            while line and not line.endswith(ends):
                line = text.readline(DROPPED)
            yield number, records.too_long()


def _parsed_lines(lines: Lines, parse: Callable[[str], Row]) -> Records:
    for number, line in lines:
        if isinstance(line, RecordFault):
            yield number, line
        elif line.strip():
            try:
                yield number, parse(line)
            except RecordFault as fault:
                yield number, fault


def _text_row(line: str) -> Row:
    return {"text": line.rstrip("\r\n")}


def _json_row(line: str) -> Row:
    try:
        row = JSON.decode(line)
    except json.JSONDecodeError as error:
        raise RecordFault("invalid JSON", f" ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise RecordFault("JSON that is nested too deeply") from error
    if not isinstance(row, dict):
        raise RecordFault("not a JSON object")
    return row


def _json_object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        row |= {key: RecordFault("a key that occurs more than once") for key, count in counts.items() if count > 1}
    return row


JSON = json.JSONDecoder(
    object_pairs_hook=_json_object, parse_int=str, parse_float=str, parse_constant=str
)  # as written


def _parquet_records(file: Path) -> Records:
    """Yield the rows of a .parquet file, with the names of the labels that `datasets` stores in it.

    Raises:
        InputError: the file is unreadable.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        source = pq.ParquetFile(_seekable(file))
        labels = _stored_labels((source.schema_arrow.metadata or {}).get(b"huggingface", b""))
        groups = (source.metadata.row_group(number) for number in range(source.metadata.num_row_groups))
        row_bytes = sum(group.total_byte_size for group in groups) // max(source.metadata.num_rows, 1)
        batches = source.iter_batches(max(1, min(ROWS, records.RECORD_BYTES // max(row_bytes, 1))))
        tables = (pa.Table.from_batches([batch]) for batch in batches)
        yield from arrow_records(tables, str(file), labels)
    except (pa.ArrowException, OSError) as error:
        fix = "\nRemove the file, or write it again."
        raise InputError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]}).{fix}") from error


def _stored_labels(info: bytes) -> Labels:
    """Return the names of labels in what `datasets` stores with a table; none in what other programs do."""
    try:
        return label_names(json.loads(info)["info"]["features"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def _seekable(file: Path) -> Path | IO[bytes]:
    """Return the file, or a temporary file with its decompressed content, since .parquet is not read in order."""
    if file.suffix.lower() not in COMPRESSED_ENDINGS:
        return file
    plain = TemporaryFile()  # noqa: SIM115  closed with its last reference
    with open_decompressed(file) as stream:
        shutil.copyfileobj(stream, plain)
    return plain


def arrow_records(tables: "Iterable[pa.Table]", name: str, labels: Labels) -> Records:
    """Yield the rows of successive tables, with names instead of the numbers of labels.

    A value that cannot be read, such as invalid UTF-8, is an exception in its row.
    """
    number = 0
    for table in tables:
        ambiguous = ambiguous_columns(table.schema.names, name)
        for row in _arrow_rows(table):
            number += 1
            yield number, with_label_names(row, labels) | ambiguous


def _arrow_rows(table: "pa.Table") -> Iterator[Row]:
    import pyarrow as pa

    for position, field in enumerate(table.schema):
        numbers = table.column(position)
        if pa.types.is_float16(field.type):  # 0.1, not 0.0999755859375
            digits = [None if number is None else str(np.float16(number)) for number in numbers.to_pylist()]
            table = table.set_column(position, field.name, pa.array(digits, pa.string()))
        elif pa.types.is_float32(field.type):  # 0.1, not 0.10000000149011612
            table = table.set_column(position, field.name, numbers.cast(pa.string()).cast(pa.float64()))
    rows = max(1, min(ROWS, len(table) * records.RECORD_BYTES // max(table.nbytes, 1)))
    for start in range(0, len(table), rows):
        part = table.slice(start, rows)
        try:
            yield from part.to_pylist()
        except UNREADABLE:
            columns = list(zip(part.schema.names, part.columns, strict=True))
            yield from ({name: _arrow_value(column, row) for name, column in columns} for row in range(len(part)))


def _arrow_value(column: "pa.ChunkedArray", row: int) -> Any:
    try:
        return column[row].as_py()
    except UNREADABLE as error:
        is_text = isinstance(error, UnicodeDecodeError)
        return RecordFault("invalid UTF-8" if is_text else f"a value that cannot be read ({error})")
