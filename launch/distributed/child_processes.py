"""Child processes: their PYTHONPATH, their end with the parent process, and signal forwarding to them."""

import ctypes
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType

from launch import exit_codes

ROOT = Path(__file__).resolve().parents[2]
IS_CHECKOUT = (ROOT / "setup.sh").is_file()  # else installed, and ROOT is site-packages
_PR_SET_PDEATHSIG = 1


def environment() -> dict[str, str]:
    """Return this process's environment, with a PYTHONPATH on which `python -m` finds the project from any folder."""
    checkout = str(ROOT) if IS_CHECKOUT else ""  # site-packages would come before the standard library
    python_path = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": python_path}


def die_with_parent(parent: int) -> None:
    """Let the kernel send SIGKILL to this process when its parent ends for any reason (Linux).

    Args:
        parent: process id of the parent; if the parent has ended already, this process exits.
    """
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return  # not Linux: an orphan ends when it loses its connection to the parent
    if os.getppid() != parent:
        os._exit(1)


def send(number: int, pids: Iterable[int]) -> None:
    """Send a signal to the processes that still run."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def record_signals() -> AbstractContextManager[list[int]]:
    """Append every signal to the yielded list instead of handling it."""
    return forward_signals(lambda _number: None)


@contextmanager
def forward_signals(send: Callable[[int], None]) -> Iterator[list[int]]:
    """Pass every signal to `send` instead of handling it, and append it to the yielded list.

    Each child runs in its own session, so Ctrl-C at the terminal reaches only this process, and each child once.
    """
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        send(number)

    with exit_codes.handle_signals(forward):
        yield received
