"""Recorded command: what is typed into a shell to compose a run's configuration again, wherever and whenever."""

import shlex

from launch.configuration.checks import optional_value
from launch.configuration.config import Config
from launch.configuration.ignored_keys import given_keys
from launch.configuration.literal_text import override


def reproducing(config: Config) -> str:
    """The run's command, with the values in place of interpolations (`${oc.env:X}`, `${now:…}`)."""
    in_place = {given: _with_value(given, config) for given in config.record.overrides if "${" in given}
    return shlex.join(in_place.get(word, word) for word in shlex.split(config.record.command))


def _with_value(given: str, config: Config) -> str:
    value = optional_value(config, given_keys([given])[0])
    return given if value is None else override(given.partition("=")[0], value)
