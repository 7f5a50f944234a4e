"""metrics.csv: one row per logged optimizer step, one column per metric, `step` first; a cell without a value is empty.

Lightning's CSVLogger deletes older files when a run is resumed; this one appends.
"""

import csv
import io
import logging
import re
from itertools import pairwise
from pathlib import Path

from gpt2lab.storage.atomic_files import add_filename_when_full, write_text
from gpt2lab.storage.damaged_files import is_unreadable, read_lines, set_aside_damaged_lines, warn_once

log = logging.getLogger(__name__)

STEP = "step"
_STEP_OF_LINE = re.compile(r"(\d{1,18}),", re.ASCII)  # Python refuses numbers of thousands of digits


class MetricsFile:
    """Writer that appends rows; further values of the newest step are added to its row.

    In a resumed run the first write drops the rows of later steps, which the earlier process wrote.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / "metrics.csv"
        self.columns: list[str] = []
        self._row: dict[str, str] = {}
        self._row_start = 0  # byte offset of the newest row
        self._size = -1  # bytes after the last write; -1: not opened yet

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write `metrics` of `step`. Steps must not decrease within one process."""
        with add_filename_when_full(self.path):
            self._write(step, metrics)

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        values = {name: _number(float(value)) for name, value in metrics.items()}
        if self._size < 0:
            self._resume_at(step)
        elif not self.path.is_file() or self.path.stat().st_size != self._size:
            log.warning("%s was removed or changed by another program; its valid rows are kept.", self.path)
            written = self._row if self._row.get(STEP) == str(step) else {}
            self._resume_at(step)
            values = {**written, **values}
        if self._row.get(STEP) != str(step):
            self._row = {STEP: str(step)}
            self._row_start = self.path.stat().st_size if self.path.exists() else 0
        self._row |= values
        if any(name not in self.columns for name in self._row):
            self._add_columns()
        else:
            with self.path.open("r+b") as file:
                file.seek(self._row_start)
                file.write(_line(self._row, self.columns))
                file.truncate()
        self._size = self.path.stat().st_size

    def _resume_at(self, step: int) -> None:
        self._row = {}
        repair_metrics(self.path.parent, step)
        rows = [row for row in read_metrics(self.path.parent) if int(row[STEP]) <= step]
        self.columns = list(rows[0]) if rows else []
        if self.path.exists():
            self._rewrite(rows)
        self._size = self.path.stat().st_size if self.path.exists() else 0
        if rows and int(rows[-1][STEP]) == step:
            self._row = {name: value for name, value in rows[-1].items() if value}
            self._row_start = self.path.stat().st_size - len(_line(self._row, self.columns))

    def _add_columns(self) -> None:
        rows = [row for row in read_metrics(self.path.parent) if row[STEP] != self._row[STEP]]
        self.columns += [name for name in self._row if name not in self.columns]
        self._rewrite(rows)
        self._row_start = self.path.stat().st_size
        with self.path.open("ab") as file:
            file.write(_line(self._row, self.columns))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        _write_rows(self.path, self.columns, rows)


def read_metrics(run_dir: str | Path) -> list[dict[str, str]]:
    """Return the valid rows (column → text). Damaged rows are skipped: a truncated last row silently, others logged."""
    path = Path(run_dir) / "metrics.csv"
    rows, damaged = _scan(path)
    is_cut = len(damaged) == 1 and damaged[0][0] == len(rows) and _STEP_OF_LINE.match(damaged[0][1])
    if is_unreadable(path) or (damaged and not is_cut):
        warn_once(f"{path} is damaged: {len(damaged) or 'all'} lines are skipped.")
    return rows


def repair_metrics(run_dir: str | Path, step: int) -> bool:
    """Rewrite a damaged metrics.csv with its valid rows, see `set_aside_damaged_lines`; return whether it was damaged.

    Args:
        step: step of the checkpoint from which the run is resumed.
    """
    path = Path(run_dir) / "metrics.csv"
    rows, damaged = _scan(path)
    steps = [int(row[STEP]) for row in rows]
    is_damaged = set_aside_damaged_lines(path, steps, damaged, _STEP_OF_LINE, step)
    if is_damaged:
        _write_rows(path, list(rows[0]) if rows else [], rows)
    return is_damaged


def missing_steps(run_dir: str | Path, step: int) -> tuple[int, int] | None:
    """Return (first, last) step up to `step` whose rows are missing although no line is damaged; None if complete.

    Every run has a row for step 1. A checkpoint may be written before the row of its step.
    """
    steps = [int(row[STEP]) for row in read_metrics(run_dir)]
    if not steps:
        return (1, step) if step > 1 else None
    longest = max((later - earlier for earlier, later in pairwise(steps)), default=step)
    return (steps[-1] + 1, step) if steps[-1] + longest + 1 < step else None


def _scan(path: Path) -> tuple[list[dict[str, str]], list[tuple[int, str]]]:
    """Return (valid rows, [(number of valid rows before it, text) of each other line])."""
    lines = read_lines(path)
    columns = _cells(lines[0]) if lines else []
    if columns[:1] != [STEP] or len(set(columns)) < len(columns) or not all(map(str.isprintable, columns)):
        return [], [(0, line) for line in lines]
    rows: list[dict[str, str]] = []
    damaged: list[tuple[int, str]] = []
    is_whole = path.read_bytes().endswith(b"\n")
    for number, line in enumerate(lines[1:], 2):
        cells = _cells(line)
        if _is_row(cells, len(columns)) and (is_whole or number < len(lines)):
            rows.append(dict(zip(columns, cells, strict=True)))
        else:
            damaged.append((len(rows), line))
    return rows, damaged


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error:
        return []


def _is_row(cells: list[str], columns: int) -> bool:
    """Whether the cells are a step, then a number or nothing in every other column."""
    if len(cells) != columns or not _STEP_OF_LINE.fullmatch(f"{cells[0]},"):
        return False
    try:
        return all(not cell or float(cell) is not None for cell in cells[1:])
    except ValueError:
        return False


def _write_rows(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    header = _line(dict(zip(columns, columns, strict=True)), columns) if columns else b""
    write_text(path, (header + b"".join(_line(row, columns) for row in rows)).decode())


def drop_metrics_after(run_dir: str | Path, step: int) -> None:
    """Remove the rows after `step`, from which a run is resumed, and a last row that a crash truncated."""
    file = MetricsFile(run_dir)
    if file.path.exists():
        file._resume_at(step)


def series(rows: list[dict[str, str]], name: str) -> list[tuple[int, float]]:
    """Return [(step, value)] of one metric for the steps at which it was logged."""
    return [(int(row[STEP]), float(row[name])) for row in rows if row.get(name)]


def _number(value: float) -> str:
    """Format with seven digits, the precision of fp32; integers in full."""
    return str(int(value)) if value.is_integer() else f"{value:.7g}"


def _line(row: dict[str, str], columns: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([row.get(name, "") for name in columns])
    return text.getvalue().encode()
