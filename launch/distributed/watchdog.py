"""Watchdog: ends a run started by torchrun or srun when a rank has no heartbeat or makes no progress.

No parent process monitors these ranks, so they monitor each other through the rendezvous store: rank 0 all others, the
others rank 0. The rank that detects a late rank prints its number and exits; torchrun, or srun with -K, then ends the
others.
"""

import os
import sys
import threading
import time
from typing import Any, NoReturn

from gpt2lab.system.heartbeat import BEAT_SECONDS, GRACE_SECONDS, Heartbeat, Listener
from launch import exit_codes

LONGEST_GAP = 3.0  # seconds: a longer pause of the watchdog itself (process suspended) is not counted as silence
LOST_STORE_SECONDS = 5.0  # wait after losing the store, so that another rank can print the cause first


class StoreBoard:
    """Heartbeat board in a torch.distributed store, with its own client, because a client serves one thread.

    Args:
        store: the rendezvous store.
    """

    def __init__(self, store: Any) -> None:
        self._store = store.clone()

    def write(self, rank: int, words: str) -> None:
        """Set the key of this rank."""
        self._store.set(f"rank-{rank}", words)

    def read(self, ranks: list[int]) -> list[str]:
        """Return the value of each rank, "" without a key: `get` would block until a rank has started."""
        keys = [f"rank-{rank}" for rank in ranks]
        return [self._store.get(key).decode() if self._store.check([key]) else "" for key in keys]


class Watchdog:
    """Threads that monitor the other ranks until `stop`.

    Args:
        store: the store with the heartbeats.
        heartbeat: heartbeat of this rank.
        rank: global rank of this process.
        world_size: number of ranks.
        seconds: time limit for the other ranks (`rank_timeout`).
    """

    def __init__(self, store: Any, heartbeat: Heartbeat, rank: int, world_size: int, seconds: int) -> None:
        self._rank, self._world_size, self._seconds, self._store = rank, world_size, seconds, store
        self._stopped = threading.Event()
        self._unanswered = 0.0  # seconds since the last reply of the store
        self._listener = Listener(StoreBoard(store), list(range(world_size)) if rank == 0 else [0])
        self._heartbeat = heartbeat
        threading.Thread(target=self._poll_ranks, daemon=True).start()
        threading.Thread(target=self._poll_store, daemon=True).start()

    def stop(self) -> None:
        """End the monitoring; the other ranks have no time limit any more."""
        self._stopped.set()

    def exit_after_timeout(self) -> NoReturn:
        """Exit after an operation of this rank timed out; one of all waiting ranks prints the late ranks."""
        self._heartbeat.report_timeout()
        time.sleep(3 * BEAT_SECONDS)  # the other waiting ranks report their timeout too
        all_ranks = Listener(StoreBoard(self._store), list(range(self._world_size)))
        all_ranks.poll(longest_gap=0.0)
        late = all_ranks.late_ranks()
        first = min(set(range(self._world_size)) - set(late), default=0)
        if self._rank != first:
            time.sleep(3 * BEAT_SECONDS)  # the exit of one rank ends the others before they print
        self._exit(all_ranks.late_message(late, self._seconds), prints=self._rank == first)

    def _poll_ranks(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                self._listener.poll(longest_gap=LONGEST_GAP)
            except RuntimeError:  # the process that hosts the store has ended
                if not self._stopped.wait(LOST_STORE_SECONDS):
                    os._exit(exit_codes.FAILED)
                return
            self._unanswered = 0.0
            late = self._listener.silent_ranks(self._seconds) or self._listener.stalled_ranks(self._seconds)
            if late and not self._stopped.is_set():
                # If rank 0 ended after its own timeout, it has printed the late ranks.
                prints = self._rank == 0 or (self._rank == 1 and not self._listener.timed_out_ranks())
                self._exit(self._listener.late_message(late, self._seconds), prints)

    def _poll_store(self) -> None:
        """Exit when the store does not reply: if its machine hangs, the connection stays open."""
        while not self._stopped.wait(BEAT_SECONDS):
            self._unanswered += BEAT_SECONDS
            if self._unanswered >= self._seconds + GRACE_SECONDS:
                reason = f"rank 0 kept the others waiting for more than rank_timeout={self._seconds} seconds"
                self._exit(reason, prints=self._rank == 1)

    def _exit(self, reason: str, prints: bool) -> NoReturn:
        """Exit at once: the main thread may be blocked in a call that cannot be interrupted."""
        if prints and reason:
            print(f"The run failed: {reason}.", file=sys.stderr, flush=True)
            self._heartbeat.report_timeout()
        os._exit(exit_codes.FAILED)
