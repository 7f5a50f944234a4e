"""Terminal: a bar for each phase of the work on one live display, and lines printed above it.

A bar needs a terminal that can move the cursor. Elsewhere (a pipe, a log file, TERM=dumb) a long phase prints a plain
line from time to time. A narrow terminal keeps the numbers and drops the bar.
"""

import functools
import os
import stat
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:  # rich takes a tenth of a second to import, and the first lines of the programs import this module
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.live import Live
    from rich.text import Text

REFRESH = 0.2  # seconds; drawn between steps, not in a thread that would compete with them
LINE_SECONDS = 30.0  # between two plain lines of a phase
KEPT_SECONDS = 2.0  # the line of a shorter phase is removed at its end
NARROWEST_BAR, WIDEST_BAR = 10, 40  # columns
DUMB = ("dumb", "unknown")  # values of TERM
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))

Item = TypeVar("Item")


@functools.cache
def console() -> "Console":
    """Return the console of stdout, shared so that its lines are printed above the bars."""
    from rich.console import Console

    return Console(highlight=False, markup=False)


@functools.cache
def error_console() -> "Console":
    """Return the console of stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False)


def show(line: "RenderableType") -> None:
    """Print one line or renderable above the bars, without markup and wrapping."""
    console().print(line, soft_wrap=isinstance(line, str))


def terminal_width() -> int | None:
    """Return the columns of stdout; None where it is not a terminal, and lines are not wrapped."""
    return console().width if is_live(sys.stdout) else None


def printable(text: str) -> str:
    """Replace characters that would control the terminal; line ends and tabs remain."""
    return "".join(one if one in "\n\t" or unicodedata.category(one) != "Cc" else "�" for one in text)


def is_live(stream: IO[str]) -> bool:
    """Whether a stream is a terminal that can move its cursor."""
    with suppress(ValueError):  # closed
        return stream.isatty() and os.environ.get("TERM", "").lower() not in DUMB
    return False


def bar_console() -> "Console | None":
    """Return the console for bars: stdout, else stderr unless a pipe prints stdout beside it; None: no bars."""
    if os.environ.get("RANK", "0") != "0":  # under torchrun all ranks share a terminal
        return None
    if is_live(sys.stdout):
        return console()
    return error_console() if is_live(sys.stderr) and not _is_pipe(sys.stdout) else None


def _is_pipe(stream: IO[str]) -> bool:
    with suppress(OSError, ValueError):
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    return False


class Phase:
    """Progress of one phase, shown while its `with` block runs.

    Args:
        title: name of the phase.
        total: amount of work; None: unknown.
        unit: "B" for bytes, otherwise a plural noun.
        prints_lines: whether a long phase prints plain lines where no bar can be shown.
        has_rate: whether the work is even, so that its rate gives the remaining time.

    Attributes:
        done: finished amount of work.
        begun_at: amount of work that was finished before the phase began, as in a resumed run.
        numbers: newest figures, the most important first.
        remaining: seconds that are left; None: estimated from the rate, if there is one.
        has_ended: whether the phase is shown for the last time, without an ETA.
    """

    def __init__(
        self,
        title: str,
        total: float | None = None,
        unit: str = "",
        *,
        prints_lines: bool = True,
        has_rate: bool = True,
    ) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.prints_lines, self.has_rate = prints_lines, has_rate
        self.done: float = 0
        self.begun_at: float = 0
        self.numbers: list[str] = []
        self.remaining: float | None = None
        self.has_ended = False
        self._begin = self._printed = time.monotonic()

    def __enter__(self) -> Self:
        self._begin = self._printed = time.monotonic()
        _display.enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        _display.leave(self)

    def advance(self, amount: float = 1) -> None:
        """Add finished work."""
        self.done += amount
        self.refresh()

    def refresh(self, *, at_once: bool = False) -> None:
        """Show the present state, at most every `REFRESH` seconds."""
        now = time.monotonic()
        if _display.is_live:
            _display.draw(now, at_once)
        elif self.prints_lines and _display.shows(self) and now - self._printed > LINE_SECONDS:
            self._printed = now
            error_console().print("  ".join(self._words()), soft_wrap=True)

    @property
    def seconds(self) -> float:
        """Seconds since the phase began."""
        return time.monotonic() - self._begin

    def line(self, width: int) -> "Text":
        """Return the phase in one line: all figures that fit into the width, and a bar in what is left."""
        from rich.cells import cell_len
        from rich.text import Text

        numbers, has_clock = list(self.numbers), True
        words = self._words()
        while cell_len(" ".join(words)) > width and (has_clock or numbers):
            if has_clock:
                has_clock = False
            else:
                numbers.pop()
            words = self._words(numbers, has_clock)
        separator = "  " if cell_len("  ".join(words)) <= width else " "
        room = min(width - cell_len(separator.join(words)) - len(separator), WIDEST_BAR)
        line = Text(words[0], no_wrap=True, overflow="ellipsis")
        if self.total and room >= NARROWEST_BAR:
            filled = min(int(room * self.done / self.total), room)
            line.append(separator).append("━" * filled, "cyan").append("─" * (room - filled), "dim")
        return line.append("".join(separator + word for word in words[1:]))

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[Text]":
        yield self.line(options.max_width)

    def _words(self, numbers: list[str] | None = None, has_clock: bool = True) -> list[str]:
        """Return title, count, numbers, elapsed time and ETA, without those that are not known."""
        left = None if self.has_ended else self._remaining()
        clock = format_time(self.seconds) if has_clock else ""
        eta = "" if left is None else f"ETA {format_time(left)}"
        shown = self.numbers if numbers is None else numbers
        return [word for word in (self.title, self._count(), *shown, clock, eta) if word]

    def _count(self) -> str:
        if self.unit == "B":
            size, prefix = next((unit for unit in UNITS if (self.total or self.done) >= unit[0]), UNITS[-1])
            total = f"/{self.total / size:.1f}" if self.total else ""
            return f"{self.done / size:.1f}{total} {prefix}B"
        unit = f" {self.unit}" if self.unit else ""
        if self.total is not None:
            return f"{self.done:,.0f}/{self.total:,.0f}{unit}"
        return f"{self.done:,.0f}{unit}" if self.done else ""

    def _remaining(self) -> float | None:
        worked = self.done - self.begun_at
        if self.remaining is not None or not self.total or not worked or not self.has_rate:
            return self.remaining
        return self.seconds * max(self.total - self.done, 0) / worked


class _Display:
    """The phases that are shown, the inner ones below."""

    def __init__(self) -> None:
        self._phases: list[Phase] = []
        self._live: Live | None = None
        self._drawn = 0.0

    @property
    def is_live(self) -> bool:
        return self._live is not None

    def shows(self, phase: Phase) -> bool:
        return phase in self._phases

    def enter(self, phase: Phase) -> None:
        self._phases.append(phase)
        target = bar_console() if self._live is None else None
        if target is not None:
            self._live = self._started(target)
        self.draw(time.monotonic(), at_once=True)

    def leave(self, phase: Phase) -> None:
        is_outermost = self._phases[:1] == [phase]
        if is_outermost and self._live is not None:
            live, self._live = self._live, None
            live.stop()
            if phase.seconds >= KEPT_SECONDS:
                phase.has_ended = True
                live.console.print(phase)
        if phase in self._phases:  # with those inside it, which an exception may have left
            del self._phases[self._phases.index(phase) :]
        self.draw(time.monotonic(), at_once=True)

    def draw(self, now: float, at_once: bool = False) -> None:
        if self._live is not None and (at_once or now - self._drawn > REFRESH):
            self._drawn = now
            self._live.refresh()

    def _started(self, target: "Console") -> "Live":
        from rich.console import Group
        from rich.live import Live

        live = Live(
            console=target,
            auto_refresh=False,
            transient=True,
            redirect_stdout=is_live(sys.stdout),
            redirect_stderr=is_live(sys.stderr),
            get_renderable=lambda: Group(*self._phases),
        )
        live.start()
        target.show_cursor(True)  # a process that is killed would leave it hidden
        return live


_display = _Display()


def track(items: Iterable[Item], title: str, total: float | None = None, unit: str = "") -> Iterator[Item]:
    """Yield the items, and show how many there were; nothing is shown of a total of 0."""
    if total == 0:
        return
    with Phase(title, total, unit) as phase:
        for item in items:
            yield item
            phase.advance()


def format_time(seconds: float) -> str:
    """Format a time as minutes and seconds, from one hour on as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
