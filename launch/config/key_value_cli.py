"""Key=value command line: everything after the first `=` is the value, without further parsing.

evaluate.py and generate.py use it because Hydra's grammar rejects free text such as `prompt=def add(a, b):`. The
arguments of a command are a dataclass, whose fields are created by `argument`.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from gpt2lab.errors import InputError
from gpt2lab.storage.atomic_files import can_write
from gpt2lab.storage.utf8 import check_process
from launch.config.did_you_mean import nearest

Arguments = TypeVar("Arguments")


def argument(
    help_text: str,
    default: Any = dataclasses.MISSING,
    *,
    choices: Sequence[str] = (),
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> Any:
    """Create a field of an arguments dataclass; a field without a default is required.

    Args:
        help_text: one line for --help.
        choices: allowed values; empty: any.
        at_least, at_most: allowed range of a number.
    """
    metadata = {"help": help_text, "choices": tuple(choices), "range": (at_least, at_most)}
    return dataclasses.field(default=default, metadata=metadata)


def parse(words: Sequence[str], kind: type[Arguments]) -> Arguments:
    """Parse `key=value` words into an arguments dataclass with str, bool, int and float fields.

    Raises:
        InputError: a word has no `=`, a key is unknown, repeated or missing, a value has the wrong type or is out of
            range, or the text is not valid UTF-8.
    """
    check_process(words)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
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
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values]
    if missing:
        raise InputError("\n".join(f"{name}= is missing: {fields[name].metadata['help']}." for name in missing))
    return kind(**values)


def describe(kind: type) -> str:
    """Return the help text: one line per argument."""
    lines = []
    for field in dataclasses.fields(kind):
        default = "" if field.default in (dataclasses.MISSING, "") else f" (default {_format_default(field.default)})"
        choices = f" {{{', '.join(field.metadata['choices'])}}}" if field.metadata["choices"] else ""
        lines.append(f"  {field.name + '=':<16} {field.metadata['help']}{choices}{default}")
    return "\n".join(lines)


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


def _format_default(value: str | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _convert(field: dataclasses.Field, text: str) -> str | int | float:
    if field.type is str:
        choices = field.metadata["choices"]
        if choices and text not in choices:
            message = f"{field.name}={text}: no such value{nearest(text, choices)}."
            raise InputError(f"{message}\nAllowed: {', '.join(choices)}.")
        return text
    if field.type is bool:
        if text.lower() not in ("true", "false"):
            raise InputError(f"{field.name}={text} is not true or false; for example {field.name}=true.")
        return text.lower() == "true"
    assert field.type in (int, float)
    try:
        value = field.type(text)
    except ValueError:
        kind = "a whole number" if field.type is int else "a number"
        raise InputError(f"{field.name}={text} is not {kind}; for example {field.name}={field.default}.") from None
    low, high = field.metadata["range"]
    if not low <= value <= high:
        bounds = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high}"
        raise InputError(f"{field.name}={text} is out of range: it must be {bounds}.")
    return value
