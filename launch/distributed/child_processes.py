"""Child processes: where they import modules from, their end with the parent process, and signal forwarding to them."""

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
    """Return this process's environment, with the module search path of child processes (`module_path`)."""
    return {**os.environ, **module_path()}


def module_path() -> dict[str, str]:
    """Return the variables that decide where a child process of any kind imports modules from.

    They are the project, then PYTHONPATH, then what is installed. The working directory is not among them: a user's
    `callbacks/` or `random.py` there would replace a module of this project or of the standard library. So empty
    entries of PYTHONPATH, which stand for that folder, are left out.
    """
    checkout = str(ROOT) if IS_CHECKOUT else ""  # site-packages would come before the standard library
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    entries = dict.fromkeys(entry for entry in [checkout, *given] if entry)
    return {"PYTHONPATH": os.pathsep.join(entries), "PYTHONSAFEPATH": "1"}


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
