"""Cluster watch: on every rank that torchrun or srun has started, ends the run when another keeps it waiting too long.

Nobody here has started the ranks and could listen to them, so they listen to each other, through the store they met at:
rank 0 to all, the others to rank 0. Who finds a rank silent or stuck names it and ends its own process; torchrun, or
srun with -K, then ends the others.
"""

import os
import sys
import threading
import time
from typing import Any, NoReturn

from gpt2lab.system.heartbeat import BEAT_SECONDS, GRACE_SECONDS, Heartbeat, Listener
from launch import exit_codes

LONGEST_GAP = 3.0  # seconds that a pause of the watch itself counts at most: it is not the others that were silent then
LOST_SECONDS = 5.0  # for who has lost the store: perhaps somebody names the rank that is to blame


class StoreBoard:
    """A board in a store of torch.distributed; a client of its own, for one store serves one thread.

    Args:
        store: where the ranks met.
    """

    def __init__(self, store: Any) -> None:
        self._store = store.clone()

    def write(self, rank: int, words: str) -> None:
        """Under the rank's own key."""
        self._store.set(f"rank-{rank}", words)

    def read(self, ranks: list[int]) -> list[str]:
        """Rank by rank, for one that has not begun has no key, and asking for it would wait."""
        keys = [f"rank-{rank}" for rank in ranks]
        return [self._store.get(key).decode() if self._store.check([key]) else "" for key in keys]


class Watch:
    """Listens to the others for a rank, until it is stopped.

    Args:
        store: where the ranks met and beat.
        heartbeat: of this rank.
        rank: of this process.
        world_size: number of ranks.
        seconds: that the others may keep this one waiting.
    """

    def __init__(self, store: Any, heartbeat: Heartbeat, rank: int, world_size: int, seconds: int) -> None:
        self._rank, self._world_size, self._seconds, self._store = rank, world_size, seconds, store
        self._stopped = threading.Event()
        self._deaf = 0.0  # seconds since the store last answered
        self._ears = Listener(StoreBoard(store), list(range(world_size)) if rank == 0 else [0])
        self._heartbeat = heartbeat
        threading.Thread(target=self._listen_on, daemon=True).start()
        threading.Thread(target=self._keep_time, daemon=True).start()

    def stop(self) -> None:
        """The others may take as long as they like from now on."""
        self._stopped.set()

    def end_in_vain(self) -> NoReturn:
        """This rank gave up waiting: name who kept it waiting, once for all that did, and end this process."""
        self._heartbeat.waited_in_vain()
        time.sleep(3 * BEAT_SECONDS)  # the others leave word too
        all_ranks = Listener(StoreBoard(self._store), list(range(self._world_size)))
        all_ranks.listen(longest_gap=0.0)
        late = all_ranks.behind()
        first = min(set(range(self._world_size)) - set(late), default=0)
        if self._rank != first:
            time.sleep(3 * BEAT_SECONDS)  # the end of one rank ends the others
        self._end(all_ranks.blame(late, self._seconds), speaks=self._rank == first)

    def _listen_on(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                self._ears.listen(longest_gap=LONGEST_GAP)
            except RuntimeError:  # the store is gone, and with it who kept it
                if not self._stopped.wait(LOST_SECONDS):
                    os._exit(exit_codes.FAILED)
                return
            self._deaf = 0.0
            late = self._ears.silent(self._seconds) or self._ears.stuck(self._seconds)
            if late and not self._stopped.is_set():
                # Rank 0 that has ended because it waited itself has said for whom.
                speaks = self._rank == 0 or (self._rank == 1 and not self._ears.gave_up())
                self._end(self._ears.blame(late, self._seconds), speaks)

    def _keep_time(self) -> None:
        """The store may neither answer nor break off, where the machine that keeps it stands still."""
        while not self._stopped.wait(BEAT_SECONDS):
            self._deaf += BEAT_SECONDS
            if self._deaf >= self._seconds + GRACE_SECONDS:
                told = f"rank 0 kept the others waiting for more than rank_timeout={self._seconds} seconds"
                self._end(told, speaks=self._rank == 1)

    def _end(self, told: str, speaks: bool) -> NoReturn:
        """At once: the main thread may wait in a call that nothing can interrupt."""
        if speaks and told:
            print(f"The run failed: {told}.", file=sys.stderr, flush=True)
            self._heartbeat.waited_in_vain()
        os._exit(exit_codes.FAILED)
