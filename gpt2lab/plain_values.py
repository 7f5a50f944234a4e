"""Plain values: settings dataclasses as dictionaries, which `torch.load(weights_only=True)` reads, and back."""

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

Settings = TypeVar("Settings")


def to_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with each dataclass as a dictionary; values of other classes are left out."""
    as_values = {
        name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for name, value in values.items()
    }
    return {name: value for name, value in as_values.items() if is_plain(value)}


def is_plain(value: Any) -> bool:
    """Whether a value consists of numbers, texts, None, and containers of these."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


def from_plain(kind: type[Settings], value: Settings | Mapping[str, Any]) -> Settings:
    """Return a settings dataclass from the dictionary that `to_plain` makes of it; an instance is returned unchanged.

    Raises:
        TypeError: an unknown or a missing field.
    """
    if not isinstance(value, Mapping):
        return value
    hints = get_type_hints(kind)
    nested = {item.name for item in fields(kind) if is_dataclass(hints[item.name])}  # type: ignore[arg-type]
    return kind(**{name: from_plain(hints[name], one) if name in nested else one for name, one in value.items()})
