"""Records: rows of files and data sets, whose faults end the run with their place or are skipped and counted."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from datamodules.text_decoding import NotTextError, decode
from gpt2lab.errors import InputError
from gpt2lab.storage.damaged_files import warn_once

RECORD_BYTES = 64 * 2**20  # maximum size of a record
WHOLE_NUMBER = re.compile(r"-?\d+")

Row = dict[str, Any]  # column → value; an exception is a value that cannot be read, which `value_text` raises
Labels = dict[str, Any]  # column → names of its labels by number; of a column with fields again a dictionary
Item = TypeVar("Item")
Convert = Callable[[Row, str], Item]  # (record, name of its file or data set) → item, or raises a RecordFault


class RecordFault(ValueError):
    """Fault of a single record.

    Attributes:
        reason: what is wrong; skipped records are counted by it.
        detail: continues the reason in an error message.
        fix: what to do, besides skipping; empty: choose another column.
    """

    def __init__(self, reason: str, detail: str = "", fix: str = "Fix the line") -> None:
        super().__init__(reason)
        self.reason, self.detail, self.fix = reason, detail, fix

    def input_error(self, place: str, alternative: str = "") -> InputError:
        """Return the error that ends the run."""
        return InputError(f"{place}{self.reason}{self.detail}.\n{self.fix}{alternative}")


Records = Iterator[tuple[int, Row | RecordFault]]  # with their line or row numbers from 1


def sound_records(
    name: str,
    records: Records,
    on_bad_line: str,
    convert: Convert[Item],
    labels: Labels | None = None,
    unit: str = "rows",
) -> Iterator[Item]:
    """Yield the converted records; log once how many were skipped, and why.

    Args:
        name: the file or data set, for messages; empty: the records have no place, and no key skips them.
        labels: names of labels that are stored as numbers.

    Raises:
        InputError: a record has a fault and `on_bad_line` is not skip.
    """
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    for number, row in records:
        try:
            if isinstance(row, RecordFault):
                raise row
            item = convert(with_label_names(row, labels) if labels else row, name)
        except RecordFault as fault:
            if not name:
                raise fault.input_error("") from fault
            if on_bad_line != "skip":
                raise fault.input_error(f"{name}:{number}: ", f", or skip such {unit}: on_bad_line=skip") from fault
            counts[fault.reason] += 1
            first.setdefault(fault.reason, number)
            continue
        yield item
    if counts:
        reasons = (f"{count} × {reason} (first: {unit[:-1]} {first[reason]})" for reason, count in counts.items())
        warn_once(f"{name}: skipped {counts.total()} invalid {unit}: {', '.join(reasons)}")


def unchanged(row: Row, name: str) -> Row:
    """Return the record; the conversion that converts nothing."""
    return row


def value_text(value: Any, name: str = "") -> str:
    """Return the text of a value: bytes decoded, numbers as written, true and false, nothing for null.

    Args:
        name: the file or data set, for a notice.

    Raises:
        RecordFault: a list, an object, binary data, a lone surrogate, or longer than a record may be.
        Exception: the value is an exception.
    """
    if isinstance(value, Exception):
        raise value
    if value is None or isinstance(value, bool):
        return "" if value is None else str(value).lower()
    if isinstance(value, list | tuple | dict):
        raise RecordFault("an object, not text" if isinstance(value, dict) else "a list, not text", fix="")
    if isinstance(value, bytes):
        try:
            value, notice = decode(value)
        except NotTextError as error:
            raise RecordFault(error.reason, f" ({error.detail})", fix="") from error
        if notice:
            warn_once(f"{name}: bytes that are not UTF-8 are read as Latin-1")
    text = str(value)
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:  # JSON may contain lone surrogates
        found = f" (the lone surrogate \\u{ord(text[error.start]):x}, half of a character)"
        raise RecordFault("invalid text", found) from error
    if size > RECORD_BYTES:
        raise too_long()
    return text


def too_long() -> RecordFault:
    """Return the fault of a record above the maximum size."""
    return RecordFault(f"longer than {RECORD_BYTES / 2**20:g} MB", fix="Split it into shorter ones")


def ambiguous_columns(names: Iterable[str], place: str) -> Row:
    """Return an error as the value of each name that several columns have."""
    return {
        name: InputError(f"{place}: {count} columns have the name {name!r}.\nGive each its own name.")
        for name, count in Counter(names).items()
        if count > 1
    }


def label_names(features: dict[str, Any]) -> Labels:
    """Return the names in the ClassLabel columns of `datasets.Features.to_dict()`."""
    found = {
        column: feature.get("names") if feature.get("_type") == "ClassLabel" else label_names(feature)
        for column, feature in features.items()
        if isinstance(feature, dict)
    }
    return {column: names for column, names in found.items() if names}


def with_label_names(row: Row, labels: Labels) -> Row:
    """Return the record with names instead of the numbers of labels; -1 and other numbers without a name are null."""
    return row | {column: _label(row[column], names) for column, names in labels.items() if column in row}


def _label(value: Any, names: Any) -> Any:
    if isinstance(names, dict):
        return with_label_names(value, names) if isinstance(value, dict) else value
    if value in names or not WHOLE_NUMBER.fullmatch(str(value)):
        return value
    return names[int(value)] if 0 <= int(value) < len(names) else None
