"""Heartbeats: silent and stalled ranks are detected from the files that living threads touch."""

import signal
import subprocess
import threading
from pathlib import Path

import pytest

from gpt2lab.system.heartbeat import BEAT_SECONDS, FolderBoard, Heartbeat, Listener
from launch.distributed.local_ranks import _kill_silent

HANG = 120  # seconds until a thread that should continue counts as hanging


class SimulatedTime:
    """Replaces the time module: time passes only in `advance`, which waits until every thread sleeps again."""

    def __init__(self) -> None:
        self.now = 0.0
        self._changed = threading.Condition()
        self._wakes: dict[int, float] = {}  # thread → when it wakes

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._changed:
            wakes = self._wakes[threading.get_ident()] = self.now + seconds
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.now >= wakes)

    def advance(self, seconds: float) -> None:
        with self._changed:
            self.now += seconds
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: all(wakes > self.now for wakes in self._wakes.values()), HANG)

    def heartbeat(self, board: FolderBoard, rank: int) -> Heartbeat:
        """Start a heartbeat; its thread has beaten once and sleeps."""
        with self._changed:
            before = len(self._wakes)
            heartbeat = Heartbeat(board, rank)
            assert self._changed.wait_for(lambda: len(self._wakes) > before, HANG)
        return heartbeat


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimulatedTime:
    simulated = SimulatedTime()
    monkeypatch.setattr("gpt2lab.system.heartbeat.time", simulated)
    return simulated


def listened(clock: SimulatedTime, listener: Listener, seconds: float) -> None:
    for _ in range(round(seconds / 0.05)):
        clock.advance(0.05)
        listener.poll(longest_gap=1.0)


def test_rank_without_heartbeat_is_silent(clock: SimulatedTime, tmp_path: Path) -> None:
    clock.heartbeat(FolderBoard(tmp_path), 0)
    listener = Listener(FolderBoard(tmp_path), [0, 1])
    listened(clock, listener, 1.6 * BEAT_SECONDS)
    assert listener.silent_ranks(1.4 * BEAT_SECONDS) == [1]
    clock.heartbeat(FolderBoard(tmp_path), 1)
    listened(clock, listener, 0.5 * BEAT_SECONDS)
    assert listener.silent_ranks(1.4 * BEAT_SECONDS) == []


def test_pause_of_the_listener_makes_no_rank_silent(clock: SimulatedTime, tmp_path: Path) -> None:
    (tmp_path / "rank-0").write_text('[1, 1, "in step 1"]')
    listener = Listener(FolderBoard(tmp_path), [0])
    listener.poll(longest_gap=0.1)
    clock.advance(0.5)  # as if the listener itself had been stopped
    listener.poll(longest_gap=0.1)
    assert listener.silent_ranks(0.15) == []


def test_rank_with_fewer_progress_marks_is_late(clock: SimulatedTime, tmp_path: Path) -> None:
    first, second = (clock.heartbeat(FolderBoard(tmp_path), rank) for rank in (0, 1))
    listener = Listener(FolderBoard(tmp_path), [0, 1])

    def behind(gave_up: bool = False) -> list[int]:
        first.beat()
        second.beat()
        listener.poll(longest_gap=1.0)
        return listener.late_ranks(gave_up)

    for heartbeat in (first, second):
        heartbeat.mark("between steps 3 and 4")
    assert behind() == []
    first.mark("in step 4")
    assert behind() == []  # no rank timed out
    assert behind(gave_up=True) == [1]
    first.report_timeout()
    assert behind() == [1]
    assert "rank 1 (last between steps 3 and 4)" in listener.late_message([1], 8)
    second.mark("in step 4")
    assert behind() == [1]  # at the same step, but not waiting


def test_only_ranks_behind_are_stalled_without_progress(clock: SimulatedTime, tmp_path: Path) -> None:
    first, second = (clock.heartbeat(FolderBoard(tmp_path), rank) for rank in (0, 1))
    listener = Listener(FolderBoard(tmp_path), [0, 1])
    first.mark("in step 1")
    listened(clock, listener, 2.6 * BEAT_SECONDS)
    assert listener.stalled_ranks(1.4 * BEAT_SECONDS) == [1]
    second.mark("in step 1")
    listened(clock, listener, 2.6 * BEAT_SECONDS)
    assert listener.stalled_ranks(1.4 * BEAT_SECONDS) == []  # all are at the same step
    first.mark("in step 2")
    first.done()
    listened(clock, listener, 2.6 * BEAT_SECONDS)
    assert listener.stalled_ranks(1.4 * BEAT_SECONDS) == []  # the other may take any time to save


def test_a_rank_that_gave_up_and_ends_slowly_is_not_blamed(clock: SimulatedTime, tmp_path: Path) -> None:
    """The rank has become silent, the rank that it waited for has not."""
    board = FolderBoard(tmp_path)
    board.write(0, '[8, 8, "in step 4, timed out waiting for other ranks"]')
    clock.heartbeat(board, 1).mark("between steps 3 and 4")
    listener = Listener(board, [0, 1])
    listened(clock, listener, 1.6 * BEAT_SECONDS)
    assert listener.silent_ranks(1.4 * BEAT_SECONDS) == [0]
    ending = subprocess.Popen(["sleep", "600"])
    blame = _kill_silent(listener, 1, {0: ending.pid})
    assert blame.startswith("rank 1 (last between steps 3 and 4) kept the others waiting")
    assert ending.wait(timeout=HANG) == -signal.SIGKILL
