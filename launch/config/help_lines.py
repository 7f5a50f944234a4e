"""Help lines: keys and values with their meaning in two columns, as wide as the terminal."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from typing import Any

from gpt2lab.keys import Key

INDENT, WIDEST = 2, 120  # columns


def format_keys(meanings: Mapping[str, Key], defaults: Mapping[str, Any]) -> str:
    """Return a row per key: `name=default`, then its meaning and the choices; MISSING is no default."""
    rows = []
    for name, meaning in meanings.items():
        choices = f" {{{', '.join(meaning.choices)}}}" if meaning.choices else ""
        rows.append((f"{name}={format_value(defaults.get(name, MISSING))}", meaning.text + choices))
    return format_rows(rows)


def format_value(value: Any) -> str:
    """Return a value as it is typed on the command line, a newline as \\n; nothing for MISSING."""
    if value is MISSING:
        return ""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"[{','.join(map(format_value, value))}]" if isinstance(value, list) else str(value).replace("\n", "\\n")


def format_rows(rows: Iterable[tuple[str, str]], left: int = 26) -> str:
    """Return two columns, the right one wrapped; a longer name than the left column stands on a line of its own."""
    width = columns()
    left = min(left, width // 2)
    lines = []
    for name, text in rows:
        head = " " * INDENT + name
        wrapped = textwrap.wrap(text, width - left, break_long_words=False, break_on_hyphens=False)
        if len(head) < left and wrapped:
            head = f"{head:<{left}}{wrapped.pop(0)}"
        lines += [head, *(" " * left + line for line in wrapped)]
    return "\n".join(lines)


def format_text(text: str) -> str:
    """Return text wrapped to the width of the terminal."""
    return textwrap.fill(text, columns(), break_long_words=False, break_on_hyphens=False)


def columns() -> int:
    """Return the width of the terminal (COLUMNS goes first), 100 where there is none."""
    return max(40, min(WIDEST, shutil.get_terminal_size((100, 24)).columns))
