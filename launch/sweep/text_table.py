"""Text table: columns and sentences for the terminal, wrapped at words to its width."""

import textwrap
from collections.abc import Sequence

GAP, INDENT = "  ", "    "


def aligned(lines: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Align the cells of a table, whose first line is its header.

    Args:
        width: columns of the terminal; a wider table continues each line, indented, with the cells that do not fit.
            None: unlimited.
    """
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    fitting = len(widths)
    while width is not None and fitting > 1 and sum(widths[:fitting]) + len(GAP) * (fitting - 1) > width:
        fitting -= 1
    shown = []
    for line in lines:
        cells = [cell.ljust(size) for cell, size in zip(line[:fitting], widths, strict=False)]
        shown.append(GAP.join(cells).rstrip())
        if rest := GAP.join(filter(None, line[fitting:])):
            shown.append(wrapped(INDENT + rest, width))
    return "\n".join(shown)


def wrapped(text: str, width: int | None = None) -> str:
    """Wrap each line at words and indent its continuation; longer words, such as paths, remain whole."""
    if width is None:
        return text
    return "\n".join(
        textwrap.fill(
            line,
            width,
            subsequent_indent=" " * (len(line) - len(line.lstrip())) + GAP,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.split("\n")
    )
