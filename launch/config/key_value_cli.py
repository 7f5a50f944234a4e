"""Key=value command line: everything after the first `=` is the value, without further parsing.

evaluate.py and generate.py use it because Hydra's grammar rejects free text such as `prompt=def add(a, b):`. The
arguments of a command are a dataclass, whose fields are created by `gpt2lab.keys.key` and by `group_key`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gpt2lab.errors import InputError
from gpt2lab.keys import METADATA, Key, format_readers
from gpt2lab.storage.atomic_files import can_write
from gpt2lab.storage.utf8 import check_process
from launch.config.allowed_values import check_value
from launch.config.did_you_mean import nearest
from launch.config.help_lines import format_keys

PRESETS = "presets"  # metadata of a group's field

Arguments = TypeVar("Arguments")


def group_key(text: str, presets: Mapping[str, Any]) -> Any:
    """Declare a field with one of several settings: `group=PRESET` selects one, `group.key=VALUE` changes a value.

    Args:
        presets: settings by name, the default first; their fields are declared by `gpt2lab.keys.key`.
    """
    metadata = {METADATA: Key(text, tuple(presets)), PRESETS: presets}
    return dataclasses.field(default=next(iter(presets.values())), metadata=metadata)


def parse(words: Sequence[str], kind: type[Arguments]) -> Arguments:
    """Parse `key=value` words into an arguments dataclass with str, bool, int, float and int | str fields, and groups.

    Raises:
        InputError: a word has no `=`, a key is unknown, repeated, missing or not read, a value has the wrong type or is
            out of range, or the text is not valid UTF-8.
    """
    check_process(words)
    fields = _fields(kind)
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise InputError(f"{word!r} is not of the form key=value.\nKeys: {', '.join(fields)}.")
        if key not in fields:
            raise InputError(f"There is no key {key}{nearest(key, fields)}.\nKeys: {', '.join(fields)}.")
        if key in values:
            raise InputError(f"{key} is given twice: {values[key]!r} and {text!r}. Give it once.")
        values[key] = convert(key, fields[key], text)
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values]
    if missing:
        raise InputError("\n".join(f"{name}= is missing: {fields[name].metadata[METADATA].text}." for name in missing))
    groups = {name: _settings(name, field, values) for name, field in fields.items() if PRESETS in field.metadata}
    return kind(**{name: value for name, value in values.items() if "." not in name} | groups)


def describe(kind: type) -> str:
    """Return the help text: every argument with its default and its meaning."""
    fields = _fields(kind)
    defaults = {name: next(iter(field.metadata.get(PRESETS, {})), field.default) for name, field in fields.items()}
    meanings = {name: field.metadata[METADATA] for name, field in fields.items()}
    return format_keys(meanings, {name: value for name, value in defaults.items() if "." not in name})


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


def convert(key: str, field: dataclasses.Field, text: str) -> str | int | float:
    """Convert the text of an argument to the type of its field.

    Raises:
        InputError: a wrong type, or not an allowed value.
    """
    value = _typed(key, field, text)
    check_value(key, field.metadata[METADATA], value, as_typed=text)
    return value


def _typed(key: str, field: dataclasses.Field, text: str) -> str | int | float:
    if field.type is str or PRESETS in field.metadata:
        return text
    if field.type is bool:
        if text.lower() not in ("true", "false"):
            raise InputError(f"{key}={text} is not true or false; for example {key}=true.")
        return text.lower() == "true"
    if field.type == int | str:
        return int(text) if text.isdecimal() else text
    assert field.type in (int, float)
    try:
        return field.type(text)
    except ValueError:
        kind = "a whole number" if field.type is int else "a number"
        raise InputError(f"{key}={text} is not {kind}; for example {key}={field.default}.") from None


def _fields(kind: type) -> dict[str, dataclasses.Field]:
    """Return the fields of an arguments dataclass by key, those of its groups included."""
    found: dict[str, dataclasses.Field] = {}
    for field in dataclasses.fields(kind):
        found[field.name] = field
        for preset in field.metadata.get(PRESETS, {}).values():
            found |= {f"{field.name}.{item.name}": item for item in dataclasses.fields(preset) if item.name != "name"}
    return found


def _settings(group: str, field: dataclasses.Field, values: dict[str, Any]) -> Any:
    """Return the chosen preset of a group with the given values."""
    presets = field.metadata[PRESETS]
    chosen = values.get(group, next(iter(presets)))
    own = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{group}.")}
    preset = presets[chosen]
    for item in dataclasses.fields(preset):
        reader = item.metadata[METADATA].read_by
        if item.name in own and preset.name not in reader.partition("=")[2].split(","):
            raise InputError(
                f"{group}={chosen} does not read {group}.{item.name}: {format_readers(reader)}.\n"
                f"Give {reader.partition(',')[0]}, or leave it out."
            )
    return dataclasses.replace(preset, **own)
