"""A command in a pseudo-terminal, as a user starts it: keys, what it prints, and its exit code."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len

STYLE, CONTROL = re.compile(r"\x1b\[[0-9;]*m"), re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # the latter moves the cursor
HANGS = 120  # seconds without output


class PseudoTerminal:
    """A process whose three standard streams are a terminal.

    Attributes:
        shown: everything it has printed.
    """

    def __init__(self, command: Sequence[str], columns: int, folder: Path, **variables: str) -> None:
        self._keyboard, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        inherited = {name: os.environ[name] for name in os.environ if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env={**inherited, "TERM": "xterm-256color", **variables},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            preexec_fn=_take_terminal,
            start_new_session=True,
        )
        os.close(terminal)
        self.shown = ""
        self._waited = 0  # characters up to the end of the last text that was waited for

    def type(self, keys: str) -> None:
        """Press keys; \\x03 is Ctrl-C."""
        os.write(self._keyboard, keys.encode())

    def wait_for(self, text: str) -> None:
        """Wait until a text is shown after all that was waited for before."""
        while text not in self.shown[self._waited :]:
            assert self._read(), f"{text!r} is not shown:\n{self.shown}"
        self._waited = self.shown.index(text, self._waited) + len(text)

    def interrupt_until(self, text: str) -> None:
        """Press Ctrl-C until a text is shown; readline misses one between showing its prompt and waiting for keys."""
        while text not in self.shown[self._waited :]:
            self.type("\x03")
            while text not in self.shown[self._waited :] and select.select([self._keyboard], [], [], 5)[0]:
                assert self._read(), f"{text!r} is not shown:\n{self.shown}"
        self._waited = self.shown.index(text, self._waited) + len(text)

    def end(self) -> int:
        """Wait for the end; return the exit code."""
        while self._read():
            pass
        os.close(self._keyboard)
        return self._process.wait()

    @property
    def lines(self) -> list[str]:
        """Everything that was shown, without control sequences, split where the cursor returns."""
        return [line for line in re.split(r"[\r\n]+", CONTROL.sub("\n", STYLE.sub("", self.shown))) if line.strip()]

    @property
    def widest(self) -> int:
        """Columns of the widest line."""
        return max(map(cell_len, self.lines))

    def _read(self) -> bool:
        ready, _, _ = select.select([self._keyboard], [], [], HANGS)
        assert ready, f"no output in {HANGS} seconds:\n{self.shown}"
        try:
            data = os.read(self._keyboard, 65536)
        except OSError:  # the terminal is closed
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)


def _take_terminal() -> None:
    """Make standard input the controlling terminal, so that Ctrl-C sends SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
