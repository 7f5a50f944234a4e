"""The one terminal that callbacks write to, so that lines stand above the progress bar and not across it."""

from rich.console import Console

console = Console()


def show(line: str) -> None:
    """One line for the person at the terminal, or for the log it is sent to; no markup, no wrapping."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
