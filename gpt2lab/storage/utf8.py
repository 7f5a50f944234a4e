"""UTF-8 checks of arguments, prompts, paths and configuration values, before a run writes anything.

Text files and the libraries accept nothing else.
"""

import os
import re
from collections.abc import Iterable
from typing import Any

from gpt2lab.errors import InputError

_surrogate = re.compile("[\ud800-\udfff]").search
FOLDERS = ("GPT2LAB_CACHE", "HF_HOME", "HOME", "TMPDIR")  # environment variables


def check_process(arguments: Iterable[str]) -> None:
    """Check command-line arguments, the working directory, and the folders in environment variables.

    Raises:
        InputError: one is not valid UTF-8.
    """
    for argument in arguments:
        check_text(argument, argument)
    for name in FOLDERS:
        check_text(os.environ.get(name, ""), f"The environment variable {name}={os.environ.get(name, '')}")
    try:
        folder = os.getcwd()  # noqa: PTH109 — Path.cwd() of a deleted folder raises another error
    except OSError:
        return
    check_text(folder, f"The working directory {folder}")


def check_values(values: Any, key: str = "") -> None:
    """Check every text in nested dictionaries and lists; the message contains its dotted key.

    Raises:
        InputError: one is not valid UTF-8.
    """
    if isinstance(values, str):
        check_text(values, f"{key}={values}")
    elif isinstance(values, dict):
        for name, value in values.items():
            check_values(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            check_values(value, key)


def _printable(text: str) -> str:
    r"""Escape text for one line of a terminal: a byte that is not UTF-8 becomes `\xff`, a line break `\n`."""
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair, which os.fsencode cannot encode
        data = text.encode("utf-8", "backslashreplace")
    letters = data.decode("utf-8", "backslashreplace")[:200]
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in letters)


def check_text(text: str, what: str) -> None:
    """Check one text.

    Args:
        what: the text's name in the message.

    Raises:
        InputError: it is not valid UTF-8.
    """
    if not _surrogate(text):
        return
    place = _surrogate(what)
    shown = f"{what[:80]}…{what[place.start() - 40 :]}" if place and place.start() > 160 else what
    raise InputError(
        f"{_printable(shown)} is not valid UTF-8; text, files and folders are read and stored as UTF-8.\n"
        "Remove the invalid bytes or half a character (a lone surrogate), or rename the file or folder."
    )
