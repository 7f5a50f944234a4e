"""Literal text: escapes and quotes text so that OmegaConf, Hydra's override grammar and YAML read it unchanged."""

import re
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, MissingMandatoryValue, OmegaConfBaseException

from gpt2lab.errors import InputError
from launch.config.structured import composable, frozen


def escape_interpolations(value: Any) -> Any:
    """Escape every `${` in strings, also in nested dicts and lists, so that OmegaConf does not resolve it."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    if isinstance(value, dict):
        return {key: escape_interpolations(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escape_interpolations(item) for item in value]
    return value


def to_dataclass(kind: type, values: dict[str, Any]) -> Any:
    """Create a dataclass from plain values, with type checks and conversion but without interpolation.

    Raises:
        OmegaConfBaseException: a key is unknown or missing, or a value has the wrong type.
    """
    return frozen(kind, OmegaConf.merge(OmegaConf.structured(composable(kind)), escape_interpolations(values)))


def quote(text: str) -> str:
    """Quote text for Hydra's grammar; interpolations in it are still resolved."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + (r"\'" if match[2] else ""), text) + "'"


def override(key: str, value: Any) -> str:
    """Return the Hydra override `key=value` with exactly this value; text is quoted only if necessary."""
    if isinstance(value, str) and "${" not in value and _parsed(f"{key}={value}") == value:
        return f"{key}={value}"
    return f"{key}={_hydra_literal(value)}"


def is_read_verbatim(argument: str) -> bool:
    """Whether Hydra reads the value of `key=value` as exactly this text, or as the text inside its quotes."""
    text = argument.partition("=")[2]
    parsed = _parsed(argument)
    return text == "null" or isinstance(parsed, QuotedString) or (isinstance(parsed, str) and parsed == text)


def unresolved_error(error: OmegaConfBaseException) -> InputError:
    """Return the error for a value that is missing, or has an interpolation that cannot be parsed or leads nowhere."""
    if isinstance(error, MissingMandatoryValue):
        return InputError(f"{error.full_key}=??? has no value: ??? stands for one that must be given.\nGive a value.")
    reason = str(error).splitlines()[0].rstrip(".")
    if isinstance(error, GrammarParseError):
        reason = "it cannot be read as ${key} or ${resolver:arguments}"
    return InputError(
        f"{error.full_key}: cannot resolve the interpolation ${{…}} in its value: {reason}.\n"
        "Correct it; to keep ${ as text, write \\${ and put the argument in single quotes."
    )


def is_interpolated(argument: str) -> bool:
    """Whether the value of `key=value` contains an interpolation, escaped or not."""
    return "${" in argument or (r"$\{" in argument and "${" in repr(_parsed(argument)))


def _parsed(argument: str) -> Any:
    """Parse the value with Hydra's grammar; quoted text is a QuotedString; None for null and for syntax errors."""
    try:
        return OverridesParser.create().parse_overrides([argument])[0]._value
    except OverrideParseException:
        return None


def _hydra_literal(value: Any) -> str:
    if isinstance(value, str):
        return quote(escape_interpolations(value))
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_hydra_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra_literal, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that escapes Unicode line breaks (U+0085, U+2028), which PyYAML would not read back."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def to_yaml(values: dict[str, Any] | list[str]) -> str:
    """Return YAML from which `yaml.safe_load` restores equal values, including any text and exact floats."""
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=2**30)
