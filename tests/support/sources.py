"""The text of tiny runs: the beginnings of a few real Python files."""

import heapq
from collections.abc import Sequence
from pathlib import Path

NAMES = ("bisect", "contextlib", "copy", "fnmatch", "glob", "heapq", "queue", "shlex", "string", "textwrap")
LENGTH = 2500  # of each, in characters: a validation of whole files takes longer than the training


def write_sources(folder: Path, names: Sequence[str] = NAMES, length: int = LENGTH) -> None:
    """Write the first `length` characters of a few real Python files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        original = Path(heapq.__file__).with_name(f"{name}.py")
        (folder / original.name).write_text(original.read_text()[:length])
