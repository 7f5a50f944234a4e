"""Heartbeat: progress reports of every rank, from which a listener finds ranks that hang or are late.

Once a second a thread of every rank writes (number of the beat, progress counter, current activity) to a board. All
ranks go through the same activities in the same order, so the rank with the lowest counter makes the others wait.
"""

import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gpt2lab.storage.atomic_files import NO_SPACE

BEAT_SECONDS = 1.0
GRACE_SECONDS = 10  # a silent rank is found before the ranks that wait for it time out
TIMED_OUT = "timed out waiting for other ranks"
DONE = "done"


class Board(Protocol):
    """Storage that every rank writes and a listener reads; `write` raises OSError or RuntimeError once it is closed."""

    def write(self, rank: int, text: str) -> None:
        """Replace the text of this rank."""

    def read(self, ranks: list[int]) -> list[str]:
        """Return the latest texts of these ranks; empty for a rank that has not started."""


class FolderBoard:
    """Board for the ranks of one machine: one file per rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, rank: int, text: str) -> None:
        """Replace the file atomically, so that a reader never sees a partial text."""
        scratch = self.folder / f".rank-{rank}"
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(self.folder / f"rank-{rank}")

    def read(self, ranks: list[int]) -> list[str]:
        """Return the contents of the files."""
        files = [self.folder / f"rank-{rank}" for rank in ranks]
        return [file.read_text(encoding="utf-8") if file.exists() else "" for file in files]


class Heartbeat:
    """Progress reports of one rank, written from a thread: they end only when the process is stopped or dies."""

    def __init__(self, board: Board, rank: int) -> None:
        self._board, self._rank = board, rank
        self._beats, self._progress, self._activity = 0, 0, "getting ready"
        self._writing = threading.Lock()
        threading.Thread(target=self._run, daemon=True).start()

    def mark(self, activity: str) -> None:
        """Begin the next activity; the thread writes it."""
        self._progress, self._activity = self._progress + 1, activity

    def done(self) -> None:
        """Report that this rank has finished and may end before the others."""
        self._activity = DONE
        with suppress(OSError):  # a full disk: the exit code carries the same information
            self.beat()

    def report_timeout(self) -> None:
        """Report at once that this rank ends because it waited too long for another."""
        self._activity = f"{self._activity}, {TIMED_OUT}"
        self.beat()

    def beat(self) -> None:
        """Write now."""
        with self._writing:
            self._beats += 1
            self._board.write(self._rank, json.dumps([self._beats, self._progress, self._activity]))

    def _run(self) -> None:
        while True:
            try:
                self.beat()
            except OSError as error:
                if error.errno not in NO_SPACE:
                    return  # the run has ended and removed the board
            except RuntimeError:
                return
            time.sleep(BEAT_SECONDS)


@dataclass
class _RankState:
    beats: int = 0
    progress: int = -1
    activity: str = "starting"
    silence: float = 0.0  # seconds without a beat, counted only while the listener polls


class Listener:
    """Reader of the board that finds silent, stalled and late ranks.

    Args:
        ranks: ranks to read.
    """

    def __init__(self, board: Board, ranks: list[int]) -> None:
        self._board = board
        self._ranks = {rank: _RankState() for rank in ranks}
        self._stillness = 0.0  # seconds without progress of any rank
        self._last = time.monotonic()

    def poll(self, longest_gap: float) -> None:
        """Read the board; time since the last poll counts for at most `longest_gap` seconds."""
        now = time.monotonic()
        passed, self._last = min(now - self._last, longest_gap), now
        self._stillness += passed
        for state, text in zip(self._ranks.values(), self._board.read(list(self._ranks)), strict=True):
            beats, progress, activity = json.loads(text) if text else (0, -1, "starting")
            state.silence = 0.0 if beats != state.beats else state.silence + passed
            self._stillness = 0.0 if progress != state.progress else self._stillness
            state.beats, state.progress, state.activity = beats, progress, activity

    def silent_ranks(self, seconds: float) -> list[int]:
        """Return the ranks without a beat for `seconds` that are not done."""
        return [rank for rank, state in self._ranks.items() if state.silence >= seconds and state.activity != DONE]

    def stalled_ranks(self, seconds: float) -> list[int]:
        """Return the ranks with the lowest counter, if no rank has made progress for `seconds` and none is done."""
        is_over = any(state.activity == DONE for state in self._ranks.values())
        return self._slowest_ranks() if self._stillness >= seconds and not is_over else []

    def late_ranks(self, timed_out: bool = False) -> list[int]:
        """Return the ranks for which others timed out: those with the lowest counter, else those that did not time out.

        Args:
            timed_out: whether a rank is known to have timed out without reporting it.
        """
        waited = self.timed_out_ranks()
        if waited or timed_out:
            late = self._slowest_ranks()
            if late:
                return late
        return [rank for rank in self._ranks if rank not in waited] if waited else []

    def timed_out_ranks(self) -> list[int]:
        """Return the ranks that reported a timeout."""
        return [rank for rank, state in self._ranks.items() if TIMED_OUT in state.activity]

    def late_message(self, late: list[int], seconds: float) -> str:
        """Return the error message that names the late ranks; empty without any."""
        ranks = " and ".join(f"rank {rank} (last {self._ranks[rank].activity})" for rank in late)
        return f"{ranks} kept the others waiting for more than rank_timeout={seconds} seconds" if ranks else ""

    def _slowest_ranks(self) -> list[int]:
        """Return the ranks with the lowest counter; none if all are equal."""
        lowest = min(state.progress for state in self._ranks.values())
        late = [rank for rank, state in self._ranks.items() if state.progress == lowest]
        return late if len(late) < len(self._ranks) else []
