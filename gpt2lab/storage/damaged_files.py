"""Damaged files: renamed to `<name>.damaged`, with one warning per process.

Used for a run's side files (metrics, samples, W&B state), none of which is needed to resume it.
"""

import logging
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)


def set_aside(path: Path) -> Path:
    """Rename a damaged file, folder or link to `<name>.damaged`, with a number where that name is taken."""
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    path.rename(aside)
    return aside


@cache
def warn_once(message: str) -> None:
    """Log a warning, once per process and message."""
    log.warning(message)


def is_unreadable(path: Path) -> bool:
    """Whether the path exists and is not a file that can be read: a folder, a pipe, a broken link, another user's."""
    if not os.path.lexists(path):
        return False
    try:
        if path.is_file():
            with path.open("rb") as file:
                file.read(1)
            return False
    except OSError:
        pass
    return True


def is_not_folder(path: Path) -> bool:
    """Whether the path exists and is not a folder: a file or a broken link."""
    return os.path.lexists(path) and not path.is_dir()


def read_file(path: Path) -> str:
    """Return the text of a file.

    Raises:
        OSError: no such file, or not a readable one; a pipe would be waited for without end.
        UnicodeDecodeError: the file is not UTF-8.
    """
    if is_unreadable(path):
        raise OSError(f"{path} is not a file that can be read")
    return path.read_text(encoding="utf-8")


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, including a last one without a line end; empty without a readable file.

    Bytes that are not UTF-8 become lone surrogates.
    """
    is_text = os.path.lexists(path) and not is_unreadable(path)
    text = path.read_bytes().decode("utf-8", errors="surrogateescape") if is_text else ""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def set_aside_damaged_lines(
    path: Path, steps: Sequence[int], damaged: Sequence[tuple[int, str]], pattern: re.Pattern[str], step: int
) -> bool:
    """Rename a file of rows if rows up to `step` cannot be read; one warning names the lost rows.

    Args:
        steps: steps of the valid rows, in the order of the file.
        damaged: (number of valid rows before it, text) of each line that is not a valid row.
        pattern: regex whose first group is the step of a line, also of a truncated one.
        step: step of the checkpoint from which the run is resumed; later rows are written again.

    Returns:
        Whether the file was renamed; the caller then rewrites the valid rows.
    """
    own = [(before, pattern.match(line)) for before, line in damaged]
    lost = [before for before, found in own if found is None or int(found[1]) <= step]
    if is_unreadable(path):
        what = "%s is not a file that can be read. It was renamed to %s, and its rows are lost."
        log.warning(what, path, set_aside(path).name)
        return True
    if not lost:
        return False
    first = steps[lost[0] - 1] + 1 if lost[0] else 1
    last = steps[lost[-1]] - 1 if lost[-1] < len(steps) else max(step, first)
    log.warning(
        "%s is damaged: %d lines are unreadable, so rows between steps %d and %d are lost; checkpoints do not contain "
        "them. %d rows are kept. The damaged file was renamed to %s.",
        *(path, len(lost), min(first, last), max(first, last), len(steps), set_aside(path).name),
    )
    return True
