"""metrics.csv: one row per logged optimizer step, one column per metric, `step` first; empty where nothing was logged.

Lightning's own CSV logger deletes older files when a run is taken up again; this one goes on where the file ends.
"""

import csv
import io
from pathlib import Path

from gpt2lab.atomic_files import write_text

STEP = "step"


class MetricsFile:
    """Appends rows; values that come later for the newest step join its row.

    In a resumed run the first write drops the rows of later steps, which the earlier process left there.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / "metrics.csv"
        self.columns: list[str] = []
        self._row: dict[str, str] = {}
        self._row_start = 0  # byte offset of the newest row
        self._open = False

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write `metrics` of `step`. Steps never decrease within one process."""
        values = {name: _number(float(value)) for name, value in metrics.items()}
        if not self._open:
            self._resume_at(step)
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

    def _resume_at(self, step: int) -> None:
        self._open = True
        rows = [row for row in read_metrics(self.path.parent) if int(row[STEP]) <= step]
        self.columns = list(rows[0]) if rows else []
        if self.path.exists():
            self._rewrite(rows)
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
        header = _line(dict(zip(self.columns, self.columns, strict=True)), self.columns) if self.columns else b""
        write_text(self.path, (header + b"".join(_line(row, self.columns) for row in rows)).decode())


def read_metrics(run_dir: str | Path) -> list[dict[str, str]]:
    """The whole rows as texts by column; a row cut short by a crash is left out."""
    path = Path(run_dir) / "metrics.csv"
    if not path.exists():
        return []
    whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    rows = list(csv.reader(whole_lines))
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:] if len(row) == len(rows[0]) and row[0].isdigit()]


def drop_metrics_after(run_dir: str | Path, step: int) -> None:
    """Remove the rows of steps after `step`, from which a run is resumed; a crash may have cut the last one short."""
    file = MetricsFile(run_dir)
    if file.path.exists():
        file._resume_at(step)


def series(rows: list[dict[str, str]], name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric, where it was logged."""
    return [(int(row[STEP]), float(row[name])) for row in rows if row.get(name)]


def _number(value: float) -> str:
    """Seven digits, which is what fp32 holds; whole numbers in full."""
    return str(int(value)) if value.is_integer() else f"{value:.7g}"


def _line(row: dict[str, str], columns: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([row.get(name, "") for name in columns])
    return text.getvalue().encode()
