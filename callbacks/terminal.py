"""The one terminal that callbacks write to, so that lines stand above the progress bar and not across it."""

import os
import sys

from rich.console import Console


class Terminal(Console):
    """A console that falls silent where its reader goes away, as in `python train.py | head`; training goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = Terminal()


def show(line: str) -> None:
    """One line for the person at the terminal, or for the log it is sent to; no markup, no wrapping."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
