"""Recorded command: what is typed into a shell to compose a run's configuration again, wherever and whenever."""

import shlex

from launch.checks.checks import optional_value
from launch.config.literal_text import is_interpolated, override
from launch.config.schema import Config
from launch.config.unused_keys import given_keys


def put_values_in_place(config: Config) -> None:
    """In the recorded overrides and command, replace interpolations (`${oc.env:X}`, `${now:…}`) by their values."""
    record = config.record
    literal = {given: _with_value(given, config) for given in record.overrides if is_interpolated(given)}
    record.command = shlex.join(literal.get(word, word) for word in shlex.split(record.command))
    record.overrides = [literal.get(given, given) for given in record.overrides]


def _with_value(given: str, config: Config) -> str:
    value = optional_value(config, given_keys([given])[0])
    return given if value is None else override(given.partition("=")[0], value)
