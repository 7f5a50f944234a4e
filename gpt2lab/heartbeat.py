"""Heartbeat: a sign of life from every rank of a run, so that who waits for them knows for whom.

    <folder>/rank-1    what rank 1 does, and its how-manieth deed that is; touched every second while its process runs

Ranks that train together do the same deeds in the same order, so the one with the fewest keeps the others waiting.
"""

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

BEAT_SECONDS = 1.0
WAITED = "waited for the others in vain"


class Heartbeat:
    """A rank's own: beats from a thread, so that only a process that is stopped or gone falls silent."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.file = _file(folder, rank)
        self._deeds, self._doing = 0, "getting ready"
        self._writing = threading.Lock()
        threading.Thread(target=self._beat_on, daemon=True).start()

    def mark(self, doing: str) -> None:
        """The next deed begins; costs nothing, for the thread writes it down."""
        self._deeds, self._doing = self._deeds + 1, doing

    def waited_in_vain(self) -> None:
        """Leave word at once that this rank's end is not its own fault."""
        self._doing = f"{self._doing}, {WAITED}"
        self._beat()

    def _beat(self) -> None:
        aside = self.file.with_name(f".{self.file.name}")
        with self._writing:
            aside.write_text(json.dumps([self._deeds, self._doing]), encoding="utf-8")
            aside.replace(self.file)

    def _beat_on(self) -> None:
        while True:
            try:
                self._beat()
            except FileNotFoundError:
                return  # the run is over and its scratch folder gone
            time.sleep(BEAT_SECONDS)


@dataclass
class _Heard:
    changed_ns: int = 0
    silence: float = 0.0  # seconds, only those in which somebody listened


class Listener:
    """Who starts the ranks listens to them."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder = folder
        self._heard = [_Heard() for _ in range(ranks)]
        self._last = time.monotonic()

    def listen(self, longest_gap: float) -> None:
        """Look at every rank's file; a pause of the listener's own above `longest_gap` seconds counts as that."""
        now = time.monotonic()
        passed, self._last = min(now - self._last, longest_gap), now
        for rank, heard in enumerate(self._heard):
            file = _file(self.folder, rank)
            changed = file.stat().st_mtime_ns if file.exists() else 0
            heard.silence = 0.0 if changed != heard.changed_ns else heard.silence + passed
            heard.changed_ns = changed

    def silent(self, seconds: float) -> list[int]:
        """The ranks that gave no sign of life for so long."""
        return [rank for rank, heard in enumerate(self._heard) if heard.silence >= seconds]

    def behind(self, gave_up: bool = False) -> list[int]:
        """The ranks for which others waited in vain: those with the fewest deeds, else those that did not wait.

        Args:
            gave_up: whether somebody is known to have waited who could leave no word of it.
        """
        words = [self._words(rank) for rank in range(len(self._heard))]
        waited = [WAITED in doing for _, doing in words]
        fewest = min(deeds for deeds, _ in words)
        if any(waited) or gave_up:
            late = [rank for rank, (deeds, _) in enumerate(words) if deeds == fewest]
            if len(late) < len(words):
                return late
        return [rank for rank, did in enumerate(waited) if not did] if any(waited) else []

    def last_word(self, rank: int) -> str:
        """What a rank was doing when it was last heard of."""
        return self._words(rank)[1]

    def _words(self, rank: int) -> tuple[int, str]:
        try:
            deeds, doing = json.loads(_file(self.folder, rank).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return -1, "starting"
        return int(deeds), str(doing)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}"
