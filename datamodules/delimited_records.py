"""Records of .csv files (quoted as in spreadsheets) and .tsv files (never quoted)."""

import csv
import re
from collections import deque
from collections.abc import Iterator

from datamodules import records
from datamodules.records import RecordFault, Records, Row, ambiguous_columns
from gpt2lab.errors import InputError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
FIELD = r'(?:"(?:[^"]++|"")*+"|[^",\r\n]*+)'  # quotes only around a field and, doubled, within it
SHORT_LINE = 16  # characters as which a shorter line counts, since each line of a record is an object in memory
WHOLE_RECORD = re.compile(rf"{FIELD}(?:,{FIELD})*+[\r\n]*")

Lines = Iterator[tuple[int, str | RecordFault]]  # with their ends and numbers


def delimited_records(lines: Lines, name: str, delimiter: str, header: bool) -> Records:
    """Yield the records, each with the number of its first line.

    Args:
        name: the file, for messages.
        header: whether the first line names the columns; else they are 1, 2, …

    Raises:
        InputError: the header is invalid.
    """
    csv.field_size_limit(2**31 - 1)  # articles are longer than the default of 128 Ki characters
    reader = _Reader(lines, delimiter)
    names: list[str] = []
    ambiguous: Row = {}
    for number, fields in reader:
        if not isinstance(fields, RecordFault) and "\0" in "".join(fields):
            fields = RecordFault("a NUL byte")
        if isinstance(fields, RecordFault):
            if header and not names:
                raise fields.input_error(f"{name}:{number}: ", "; this is the header")
            yield number, fields
            continue
        if not names:
            reader.columns = len(fields)
            names = fields if header else [str(column) for column in range(1, len(fields) + 1)]
            ambiguous = ambiguous_columns(names, f"{name}:{number}")
            if header:
                _check_delimiter(names, delimiter, f"{name}:{number}")
                continue
        if len(fields) == len(names):
            yield number, dict(zip(names, fields, strict=True)) | ambiguous
        else:
            yield number, RecordFault(f"{len(fields)} fields, but the first line has {len(names)}")


def _check_delimiter(names: list[str], delimiter: str, place: str) -> None:
    """Raise an InputError for a header without the delimiter, but with another one."""
    other = next((one for one in ";\t|," if len(names) == 1 and one != delimiter and one in names[0]), "")
    if other:
        kinds = ", ".join(f"{ending} by {one!r}" for ending, one in DELIMITERS.items())
        raise InputError(
            f"{place}: the header {names[0]!r} is separated by {other!r}, not by {delimiter!r}.\n"
            f"Columns are separated by the ending of the file: {kinds}. Rename or convert the file."
        )


class _Reader:
    """Iterator over (number of a record's first line, its fields or its fault).

    Attributes:
        columns: expected number of fields; 0: any.
    """

    def __init__(self, lines: Lines, delimiter: str) -> None:
        self.columns = 0
        self._lines, self._delimiter = lines, delimiter
        self._unread: deque[tuple[int, str | RecordFault]] = deque()

    def __iter__(self) -> Iterator[tuple[int, list[str] | RecordFault]]:
        """Continue after invalid quotes at the next line that begins a whole record.

        The lines between are counted as part of the invalid record.
        """
        is_damaged = False
        while (first := self._next_line()) is not None:
            number, line = first
            if isinstance(line, RecordFault):
                yield number, line
            elif line.strip("\r\n"):
                fields, taken = self._read_record(line)
                if isinstance(fields, RecordFault) or (is_damaged and not self._is_whole(fields, line, taken)):
                    self._unread.extendleft(reversed(taken))
                    if is_damaged:
                        continue
                is_damaged = isinstance(fields, RecordFault)
                yield number, fields

    def _next_line(self) -> tuple[int, str | RecordFault] | None:
        return self._unread.popleft() if self._unread else next(self._lines, None)

    def _read_record(self, line: str) -> tuple[list[str] | RecordFault, list[tuple[int, str | RecordFault]]]:
        """Return (fields or the fault, further lines read) of the record that begins with this line."""
        if self._delimiter == "\t" or '"' not in line:
            return line.rstrip("\r\n").split(self._delimiter), []
        taken: list[tuple[int, str | RecordFault]] = []

        def record_lines() -> Iterator[str]:
            yield line
            size = len(line)
            while (following := self._next_line()) is not None:
                taken.append(following)
                if isinstance(following[1], RecordFault):
                    raise following[1]
                size += max(len(following[1]), SHORT_LINE)
                if size > records.RECORD_BYTES:
                    raise records.too_long()
                yield following[1]

        try:
            return next(csv.reader(record_lines(), delimiter=self._delimiter, strict=True)), taken
        except (csv.Error, RecordFault) as error:
            fix = 'Close the quote, or write "" for a quote within quotes'
            return RecordFault("an unclosed or undoubled quote", f" ({error})", fix), taken

    def _is_whole(self, fields: list[str], line: str, taken: list[tuple[int, str | RecordFault]]) -> bool:
        """Whether a record has strict quotes and the expected number of fields."""
        text = "".join([line, *(str(following) for _, following in taken)])
        return len(fields) == (self.columns or len(fields)) and WHOLE_RECORD.fullmatch(text) is not None
