"""State of a resumed online W&B run: the row to which it is rewound, and the best values of all its rows.

W&B numbers rows itself (`_step`), which other callbacks log as well, and it rewinds to such a number. So the number at
which each training step begins is stored in the run directory.
"""

import re
from pathlib import Path
from typing import Any

from callbacks.loggers.wandb_content import best_kinds
from gpt2lab.storage.atomic_files import write_text

LINE = re.compile(rb"^(\d{1,18}),(\d{1,18})\n", re.MULTILINE)


class RowNumbers:
    """Training step → number of its first row at W&B, one line each; the last line may be truncated by a crash."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "wandb" / "row-numbers.csv"
        self.newest = -1  # training step

    def begin(self, rows: int) -> None:
        """Begin with the first `rows` rows, which the server has."""
        kept = {step: number for step, number in self._read().items() if number < rows}
        self.newest = max(kept, default=-1)
        write_text(self.path, "".join(f"{step},{number}\n" for step, number in kept.items()))

    def add(self, step: int, number: int) -> None:
        self.newest = step
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{step},{number}\n")

    def last_until(self, step: int) -> int | None:
        """Return the number of the last row until the training step; None if it is not known."""
        later = [number for other, number in self._read().items() if other > step]
        return min(later) - 1 if later and min(later) > 0 else None

    def _read(self) -> dict[int, int]:
        lines = LINE.findall(self.path.read_bytes()) if self.path.is_file() else []
        return {int(step): int(number) for step, number in lines}


class Best:
    """Best and last value of each metric that has a best one, of all rows; W&B's service knows those of its process."""

    def __init__(self) -> None:
        self._kinds = best_kinds()
        self._values: dict[str, dict[str, float]] = {}

    def add(self, row: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Add a row; return the summary of the metrics in it."""
        names = [name for name in row if name in self._kinds]
        for name in names:
            kind, last = self._kinds[name], float(row[name])
            best = self._values.get(name, {}).get(kind, last)
            self._values[name] = {kind: min(best, last) if kind == "min" else max(best, last), "last": last}
        return {name: self._values[name] for name in names}
