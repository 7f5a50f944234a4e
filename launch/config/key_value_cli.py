"""Key=value command line: everything after the first `=` is the value, without further parsing.

evaluate.py and generate.py use it because Hydra's grammar rejects free text such as `prompt=def add(a, b):`. The
arguments of a command are a dataclass, whose fields are created by `gpt2lab.keys.key`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from gpt2lab.errors import InputError
from gpt2lab.keys import keys_of
from gpt2lab.storage.atomic_files import can_write
from gpt2lab.storage.utf8 import check_process
from launch.config.allowed_values import check_value
from launch.config.did_you_mean import nearest
from launch.config.help_lines import format_keys

Arguments = TypeVar("Arguments")


def parse(words: Sequence[str], kind: type[Arguments]) -> Arguments:
    """Parse `key=value` words into an arguments dataclass with str, bool, int and float fields.

    Raises:
        InputError: a word has no `=`, a key is unknown, repeated or missing, a value has the wrong type or is out of
            range, or the text is not valid UTF-8.
    """
    check_process(words)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    meanings = dict(keys_of(kind))
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise InputError(f"{word!r} is not of the form key=value.\nKeys: {', '.join(fields)}.")
        if key not in fields:
            raise InputError(f"There is no key {key}{nearest(key, fields)}.\nKeys: {', '.join(fields)}.")
        if key in values:
            raise InputError(f"{key} is given twice: {values[key]!r} and {text!r}. Give it once.")
        values[key] = _convert(fields[key], text)
        check_value(key, meanings[key], values[key], as_typed=text)
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values]
    if missing:
        raise InputError("\n".join(f"{name}= is missing: {meanings[name].text}." for name in missing))
    return kind(**values)


def describe(kind: type) -> str:
    """Return the help text: every argument with its default and its meaning."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    return format_keys(dict(keys_of(kind)), defaults)


def check_output_file(path: str, key: str = "json") -> None:
    """Check before the work that an output file can be written.

    Args:
        path: the file; empty: no check.
        key: argument name for the message.

    Raises:
        InputError: `path` is a folder, or its folder does not exist or is not writable.
    """
    file = Path(path)
    if path and (file.is_dir() or not can_write(file.absolute().parent)):
        raise InputError(f"{key}={path} cannot be written: give a file in an existing folder with write permission.")


def _convert(field: dataclasses.Field, text: str) -> str | int | float:
    if field.type is str:
        return text
    if field.type is bool:
        if text.lower() not in ("true", "false"):
            raise InputError(f"{field.name}={text} is not true or false; for example {field.name}=true.")
        return text.lower() == "true"
    assert field.type in (int, float)
    try:
        return field.type(text)
    except ValueError:
        kind = "a whole number" if field.type is int else "a number"
        raise InputError(f"{field.name}={text} is not {kind}; for example {field.name}={field.default}.") from None
