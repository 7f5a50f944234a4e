"""References: arguments of callbacks, loggers and Trainer that follow a key, as in `every: ${sample_every}`.

Hydra resolves them once, when a run is composed. From then on all values are literal text: a path may contain `${`. The
references are stored beside the values, so that a resumed run with another `sample_every` updates the argument.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

# Groups whose nodes may refer to keys outside these groups
GROUPS = ("callbacks", "logger", "trainer")
REFERENCE = re.compile(r"\$\{(\w+(?:\.\w+)*)\}")


def find_references(value: Any, place: str) -> dict[str, str]:
    """Return {place: text} of every argument that consists of references to keys, and of plain text between them.

    Args:
        value: unresolved value of the configuration at `place`.
    """
    if isinstance(value, dict):
        items = [find_references(item, f"{place}.{key}") for key, item in value.items()]
    elif isinstance(value, list):
        items = [find_references(item, f"{place}.{number}") for number, item in enumerate(value)]
    else:
        return {place: value} if isinstance(value, str) and _is_reference(value) else {}
    return {name: text for found in items for name, text in found.items()}


def _is_reference(text: str) -> bool:
    names, rest = REFERENCE.findall(text), REFERENCE.sub("", text)
    return bool(names) and not {"$", "\\"} & set(rest) and not any(name.split(".")[0] in GROUPS for name in names)


def follow_references(value: Any, place: str, references: Mapping[str, str], lookup: Callable[[str], Any]) -> Any:
    """Return the value with every argument that follows a key set to the present value of that key.

    Args:
        references: as `find_references` returned them.
        lookup: returns the value of a key; None where it has none.
    """
    if place in references:
        return _resolved(references[place], lookup)
    if isinstance(value, dict):
        return {key: follow_references(item, f"{place}.{key}", references, lookup) for key, item in value.items()}
    if isinstance(value, list):
        items = enumerate(value)
        return [follow_references(item, f"{place}.{number}", references, lookup) for number, item in items]
    return value


def _resolved(text: str, lookup: Callable[[str], Any]) -> Any:
    """Return the value of `${key}` with its type, and text around references as text; unchanged if a key has none."""
    whole = REFERENCE.fullmatch(text)
    if whole:
        return lookup(whole[1])
    values = {name: lookup(name) for name in REFERENCE.findall(text)}
    return text if None in values.values() else REFERENCE.sub(lambda match: str(values[match[1]]), text)
