"""Heartbeat: a sign of life from every rank of a run, so that who waits for them knows for whom.

Every rank writes on a board, once a second while its process runs, which beat this is, how many deeds it has begun, and
what it does. Ranks that train together do the same deeds in the same order, so the one with the fewest keeps the others
waiting.
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
GRACE_SECONDS = 10  # a rank that fell silent is found before those that wait for it give up
WAITED = "waited for the others in vain"
DONE = "done"


class Board(Protocol):
    """Where every rank writes and somebody reads; writing raises an OSError or RuntimeError once it is gone."""

    def write(self, rank: int, words: str) -> None:
        """Replace what this rank has written."""

    def read(self, ranks: list[int]) -> list[str]:
        """What these ranks have written last; nothing of one that has not begun."""


class Folder:
    """A board for the ranks of one machine: a file for each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, rank: int, words: str) -> None:
        """Aside first, so that nobody reads half of it."""
        aside = self.folder / f".rank-{rank}"
        aside.write_text(words, encoding="utf-8")
        aside.replace(self.folder / f"rank-{rank}")

    def read(self, ranks: list[int]) -> list[str]:
        """From the files."""
        files = [self.folder / f"rank-{rank}" for rank in ranks]
        return [file.read_text(encoding="utf-8") if file.exists() else "" for file in files]


class Heartbeat:
    """A rank's own: beats from a thread, so that only a process that is stopped or gone falls silent."""

    def __init__(self, board: Board, rank: int) -> None:
        self._board, self._rank = board, rank
        self._beats, self._deeds, self._doing = 0, 0, "getting ready"
        self._writing = threading.Lock()
        threading.Thread(target=self._beat_on, daemon=True).start()

    def mark(self, doing: str) -> None:
        """The next deed begins; costs nothing, for the thread writes it down."""
        self._deeds, self._doing = self._deeds + 1, doing

    def done(self) -> None:
        """This rank has no more deeds to do, and may end while others take their time over theirs."""
        self._doing = DONE
        with suppress(OSError):  # without disk space the exit code tells the same
            self.beat()

    def waited_in_vain(self) -> None:
        """Leave word at once that this rank's end is not its own fault."""
        self._doing = f"{self._doing}, {WAITED}"
        self.beat()

    def beat(self) -> None:
        """Write now."""
        with self._writing:
            self._beats += 1
            self._board.write(self._rank, json.dumps([self._beats, self._deeds, self._doing]))

    def _beat_on(self) -> None:
        while True:
            try:
                self.beat()
            except OSError as error:
                if error.errno not in NO_SPACE:
                    return  # the run is over and the board gone
            except RuntimeError:
                return
            time.sleep(BEAT_SECONDS)


@dataclass
class _Heard:
    beats: int = 0
    deeds: int = -1
    doing: str = "starting"
    silence: float = 0.0  # seconds, only those in which somebody listened


class Listener:
    """Somebody listens to the ranks.

    Args:
        ranks: all, or those that are listened to.
    """

    def __init__(self, board: Board, ranks: list[int]) -> None:
        self._board = board
        self._heard = {rank: _Heard() for rank in ranks}
        self._stillness = 0.0  # seconds in which no rank began a deed
        self._last = time.monotonic()

    def listen(self, longest_gap: float) -> None:
        """Read the board; a pause of the listener's own above `longest_gap` seconds counts as that."""
        now = time.monotonic()
        passed, self._last = min(now - self._last, longest_gap), now
        self._stillness += passed
        for heard, words in zip(self._heard.values(), self._board.read(list(self._heard)), strict=True):
            beats, deeds, doing = json.loads(words) if words else (0, -1, "starting")
            heard.silence = 0.0 if beats != heard.beats else heard.silence + passed
            self._stillness = 0.0 if deeds != heard.deeds else self._stillness
            heard.beats, heard.deeds, heard.doing = beats, deeds, doing

    def silent(self, seconds: float) -> list[int]:
        """The ranks that gave no sign of life for so long, and are not done."""
        return [rank for rank, heard in self._heard.items() if heard.silence >= seconds and heard.doing != DONE]

    def stuck(self, seconds: float) -> list[int]:
        """The ranks with the fewest deeds, where some have more and none has begun one for so long or is done."""
        is_over = any(heard.doing == DONE for heard in self._heard.values())
        return self._with_fewest_deeds() if self._stillness >= seconds and not is_over else []

    def behind(self, gave_up: bool = False) -> list[int]:
        """The ranks for which others waited in vain: those with the fewest deeds, else those that did not wait.

        Args:
            gave_up: whether somebody is known to have waited who could leave no word of it.
        """
        waited = self.gave_up()
        if waited or gave_up:
            late = self._with_fewest_deeds()
            if late:
                return late
        return [rank for rank in self._heard if rank not in waited] if waited else []

    def gave_up(self) -> list[int]:
        """The ranks that left word that they had waited in vain."""
        return [rank for rank, heard in self._heard.items() if WAITED in heard.doing]

    def blame(self, late: list[int], seconds: float) -> str:
        """Who kept the others waiting, in words; nothing where nobody did."""
        said = " and ".join(f"rank {rank} (last {self._heard[rank].doing})" for rank in late)
        return f"{said} kept the others waiting for more than rank_timeout={seconds} seconds" if said else ""

    def _with_fewest_deeds(self) -> list[int]:
        """None where all have as many."""
        fewest = min(heard.deeds for heard in self._heard.values())
        late = [rank for rank, heard in self._heard.items() if heard.deeds == fewest]
        return late if len(late) < len(self._heard) else []
