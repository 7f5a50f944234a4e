"""Structured configurations: typed composition by OmegaConf, which needs mutable classes, into frozen dataclasses."""

import dataclasses
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from gpt2lab.keys import METADATA

Settings = TypeVar("Settings")


@cache
def composable(kind: type) -> type:
    """Return a mutable copy of a frozen dataclass and of those in it: OmegaConf composes into no frozen one."""
    hints = get_type_hints(kind)
    items: list[Any] = []
    for item in fields(kind):
        hint: Any = hints[item.name]
        hint = composable(cast(type, hint)) if is_dataclass(hint) else hint
        if METADATA in item.metadata and item.metadata[METADATA].by_size:
            hint = Any  # auto, until the size of the model is known
        default: Any = item.default_factory
        if default is not MISSING and is_dataclass(default):
            default = composable(cast(type, default))
        items.append((item.name, hint, dataclasses.field(default=item.default, default_factory=default, kw_only=True)))
    return dataclasses.make_dataclass(kind.__name__, items)


def frozen(kind: type[Settings], node: Any) -> Settings:
    """Return the frozen dataclass of a composed node.

    Raises:
        OmegaConfBaseException: an interpolation leads nowhere, a value is missing, or a list of plain values has a
            list or dictionary in it.
    """
    return _frozen(kind, OmegaConf.to_object(node))


def _frozen(kind: Any, value: Any) -> Any:
    if get_origin(kind) in (list, dict) and get_args(kind)[-1] in (str, int, float):
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, list | dict):  # OmegaConf accepts them
                raise ValidationError(f"{item} is not of type {get_args(kind)[-1].__name__}")
    if not is_dataclass(kind):
        return value
    hints = get_type_hints(kind)
    make = cast(type, kind)
    return make(**{item.name: _frozen(hints[item.name], vars(value)[item.name]) for item in fields(kind)})
