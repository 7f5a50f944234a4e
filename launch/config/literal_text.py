"""Literal text: values that no layer below reads as more than text, be it OmegaConf, Hydra's overrides, or YAML."""

import re
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from launch.config.structured import composable, frozen


def escaped(value: Any) -> Any:
    """The same value with every `${` in its strings escaped, so that OmegaConf resolves nothing in it."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(item) for item in value]
    return value


def typed_values(kind: type, values: dict[str, Any]) -> Any:
    """A dataclass from plain values, which are checked and converted but not interpolated.

    Raises:
        OmegaConfBaseException: an unknown or missing key, or a value of the wrong type.
    """
    return frozen(kind, OmegaConf.merge(OmegaConf.structured(composable(kind)), escaped(values)))


def quoted(text: str) -> str:
    """Text in the quotes of Hydra's grammar, which reads it as it is, interpolations excepted."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + (r"\'" if match[2] else ""), text) + "'"


def override(key: str, value: Any) -> str:
    """A Hydra override with exactly this value; text is quoted only where that is needed."""
    if isinstance(value, str) and "${" not in value and _parsed(f"{key}={value}") == value:
        return f"{key}={value}"
    return f"{key}={_in_hydras_grammar(value)}"


def is_read_as_typed(argument: str) -> bool:
    """Whether Hydra reads the value of `key=value` as the text that stands there, or that stands there in quotes."""
    text = argument.partition("=")[2]
    parsed = _parsed(argument)
    return text == "null" or isinstance(parsed, QuotedString) or (isinstance(parsed, str) and parsed == text)


def is_interpolated(argument: str) -> bool:
    """Whether the value of `key=value` holds an interpolation, escaped for OmegaConf or for Hydra as it may be."""
    return "${" in argument or (r"$\{" in argument and "${" in repr(_parsed(argument)))


def _parsed(argument: str) -> Any:
    """What Hydra's grammar makes of a value, quoted text as its own type; None also where it cannot read it."""
    try:
        return OverridesParser.create().parse_overrides([argument])[0]._value
    except OverrideParseException:
        return None


def _in_hydras_grammar(value: Any) -> str:
    if isinstance(value, str):
        return quoted(escaped(value))
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_in_hydras_grammar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_in_hydras_grammar, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


class _Dumper(yaml.SafeDumper):
    """PyYAML's, except that line breaks of Unicode (U+0085, U+2028) are written as escapes and so read back."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def to_yaml(values: dict[str, Any] | list[str]) -> str:
    """YAML that `yaml.safe_load` reads back equal: plain values, text of any kind, floats to the last bit."""
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=2**30)
