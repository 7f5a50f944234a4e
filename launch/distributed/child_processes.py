"""Children: processes that find this project and end with their parent, and signals that reach them exactly once."""

import ctypes
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[2]
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


def environment() -> dict[str, str]:
    """This process's, in which `python -m` finds the project's modules whatever the working directory is."""
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": search}


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however it dies (Linux).

    Args:
        parent: the process id of the parent, which may be gone already.
    """
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return  # no such call here; then an orphan ends when it next talks to its parent
    if os.getppid() != parent:
        os._exit(1)


def send(number: int, pids: Iterable[int]) -> None:
    """Send a signal to those of the processes that are still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def noting() -> AbstractContextManager[list[int]]:
    """While the block runs, signals are only noted down in the list that this gives."""
    return forwarding(lambda _number: None)


@contextmanager
def forwarding(send: Callable[[int], None]) -> Iterator[list[int]]:
    """While the block runs, hand every signal on with `send` instead of acting on it; gives the signals so far.

    The children are sessions of their own, so a Ctrl-C at the terminal reaches only this process, and them once.
    """
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        send(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
