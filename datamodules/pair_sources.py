"""Sources of pairs: functions in Python source, gettext catalogues, tables in files, data sets on the Hub.

Every source has rows (dictionaries of columns) and an identity that changes when its rows change.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.catalogue_pairs import catalogue_files, catalogue_rows
from datamodules.compressed_files import COMPRESSED_ENDINGS
from datamodules.delimited_records import DELIMITERS
from datamodules.documents import RECORD_ENDINGS, file_ending, files_identity, find_files, stdlib_corpus
from datamodules.function_pairs import function_rows
from datamodules.hub_documents import open_split
from datamodules.record_files import file_records
from datamodules.records import Convert, Item, Row, sound_records, unchanged, value_text
from datamodules.text_decoding import open_text
from gpt2lab.errors import InputError

TABLE_ENDINGS = frozenset(RECORD_ENDINGS | set(DELIMITERS))
FILE = "file"  # optional column with the source file of a row; pairs of one file are not independent


@dataclass(frozen=True)
class PairSource:
    """Rows of pairs.

    Attributes:
        identity: JSON value; with the chosen columns the cache key of the prepared pairs.
        records: iterates over the converted rows.
    """

    identity: dict[str, Any]
    records: Callable[[Convert[Any]], Iterator[Any]]

    def rows(self) -> Iterator[Row]:
        """Yield the rows as they are."""
        return self.records(unchanged)


def pair_text(row: Row, column: str, name: str = "") -> str:
    """Return the text of a column: `a.b` is b within a, `a+b` joins the non-empty ones with an empty line.

    Args:
        name: the file or data set, for a notice.

    Raises:
        KeyError: there is no such column.
        RecordFault: its value is not text.
    """
    if column in row:
        return value_text(row[column], name)
    if "+" in column:
        texts = [pair_text(row, part.strip(), name) for part in column.split("+")]
        return "\n\n".join(text for text in texts if text.strip())
    outer, _, inner = column.partition(".")
    if inner and isinstance(row.get(outer), dict):
        return pair_text(row[outer], inner, name)
    if inner and outer in row and not isinstance(row[outer], str):
        return value_text(row[outer], name)  # null, or a fault
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
        identity = {"catalogues": files_identity(files), "format": 2}
        return PairSource(identity, _own_rows(lambda: catalogue_rows(files)))
    return open_tables(path, "path", on_bad_line, columns)


def open_hub_source(dataset: str, config: str, revision: str, split: str, on_bad_line: str) -> PairSource:
    """Open a split of a data set on the Hub or in a local folder."""
    opened = open_split(dataset, config, revision, split, on_bad_line)
    return PairSource(opened.identity, opened.records)


def _is_table(path: str) -> bool:
    return Path(path).suffix in COMPRESSED_ENDINGS or file_ending(Path(path), TABLE_ENDINGS) is not None


def _own_rows(rows: Callable[[], Iterator[Row]]) -> Callable[[Convert[Any]], Iterator[Any]]:
    """Return the records of rows that are made here, so that they have no line or row number."""
    return lambda convert: sound_records("", enumerate(rows(), 1), "stop", convert)


def _functions(path: str) -> PairSource:
    if not path:
        corpus = stdlib_corpus()
        documents = corpus.documents
        return PairSource(
            corpus.identity,
            _own_rows(lambda: ({**row, FILE: one.path} for one in documents() for row in function_rows(one.text))),
        )
    files = find_files(path, "path", frozenset({".py"}))
    return PairSource(
        {"functions": files_identity(files)},
        _own_rows(lambda: ({**row, FILE: str(file)} for file in files for row in function_rows(_read_text(file)))),
    )


def _read_text(file: Path) -> str:
    with open_text(file) as stream:
        return stream.read()


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

    def records(convert: Convert[Item]) -> Iterator[Item]:
        return (item for file in files for item in file_records(file, on_bad_line, convert, header))

    return PairSource({"tables": files_identity(files), "header": header, "on_bad_line": on_bad_line}, records)
