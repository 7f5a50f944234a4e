"""Terminal shared by all callbacks, so that lines are printed above the progress bar."""

from rich.console import Console

console = Console()


def show(line: str) -> None:
    """Print one line without markup and wrapping."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
