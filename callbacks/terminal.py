"""Terminal shared by all callbacks, so that lines are printed above the progress bar."""

import os
import sys

from rich.console import Console


class Terminal(Console):
    """Console that stops printing after a broken pipe, as in `python train.py | head`; training continues."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = Terminal()


def show(line: str) -> None:
    """Print one line without markup and wrapping."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
