"""Damaged files: a damaged file is kept under another name, and each damage is logged once per process.

Only the files beside a run's checkpoints are repaired this way; none of them is needed to continue the run.
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
    """Log a warning the first time this process has it."""
    log.warning(message)


def is_no_file(path: Path) -> bool:
    """Whether something other than a file has this name: a folder, or a link that leads nowhere."""
    return os.path.lexists(path) and not path.is_file()


def is_no_folder(path: Path) -> bool:
    """Whether something other than a folder has this name: a file, or a link that leads nowhere."""
    return os.path.lexists(path) and not path.is_dir()


def lines_of(path: Path) -> list[str]:
    """The lines of a text file, the last one also where it has no line end; none where there is no such file.

    Bytes that are not UTF-8 become lone surrogates, which cannot be encoded again.
    """
    text = path.read_bytes().decode("utf-8", errors="surrogateescape") if path.is_file() else ""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def set_aside_damaged_lines(
    path: Path, steps: Sequence[int], damaged: Sequence[tuple[int, str]], pattern: re.Pattern[str], step: int
) -> bool:
    """Set a file of rows aside if rows up to `step` cannot be read; one warning names what is lost.

    Args:
        steps: of the valid rows, in the order of the file.
        damaged: the lines that are not valid rows, each with the number of valid rows before it.
        pattern: its first group is the step of a line, also of one that was cut short.
        step: of the checkpoint from which the run continues; rows after it are written again.

    Returns:
        Whether the file was set aside, so that the caller must write the valid rows anew.
    """
    own = [(before, pattern.match(line)) for before, line in damaged]
    lost = [before for before, found in own if found is None or int(found[1]) <= step]
    if is_no_file(path):
        log.warning("%s is no file. It was renamed to %s, and its rows are lost.", path, set_aside(path).name)
        return True
    if not lost:
        return False
    first = steps[lost[0] - 1] + 1 if lost[0] else 1
    last = steps[lost[-1]] - 1 if lost[-1] < len(steps) else max(step, first)
    log.warning(
        "%s is damaged: %d of its lines cannot be read, so rows between steps %d and %d are lost; checkpoints do not "
        "hold them. %d rows are kept. The damaged file was renamed to %s.",
        *(path, len(lost), min(first, last), max(first, last), len(steps), set_aside(path).name),
    )
    return True
