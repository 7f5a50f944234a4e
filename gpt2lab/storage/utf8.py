"""UTF-8: refuses text that is not, before a run makes anything: files of text and the libraries take nothing else."""

import os
from collections.abc import Iterable
from typing import Any

from gpt2lab.errors import InputError

FOLDERS = ("GPT2LAB_CACHE", "HF_HOME", "HOME", "TMPDIR")  # environment variables


def check_process(arguments: Iterable[str]) -> None:
    """Check command-line arguments, the working directory, and the folders that environment variables name.

    Raises:
        InputError
    """
    for argument in arguments:
        check_text(argument, argument)
    for name in FOLDERS:
        check_text(os.environ.get(name, ""), f"The environment variable {name}={os.environ.get(name, '')}")
    try:
        folder = os.getcwd()  # noqa: PTH109 — a Path of a folder that is gone is no error of this kind
    except OSError:
        return
    check_text(folder, f"The working directory {folder}")


def check_values(values: Any, key: str = "") -> None:
    """Check every text in nested dictionaries and lists, with the dotted name of its place.

    Raises:
        InputError
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
    r"""Text for a terminal, on one line: a byte that is not UTF-8 becomes `\xff`, a line break `\n`."""
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair, which no argument of a process can hold
        data = text.encode("utf-8", "backslashreplace")
    letters = data.decode("utf-8", "backslashreplace")[:200]
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in letters)


def check_text(text: str, what: str) -> None:
    """Check one text, which a message calls `what`.

    Raises:
        InputError
    """
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
        raise InputError(
            f"{_printable(what)} is not valid UTF-8, and configurations, reports and models are stored as UTF-8.\n"
            "Rename the file or folder, or give another."
        )
