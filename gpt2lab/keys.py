"""Key: the meaning of a configuration key, declared once, in the metadata of its dataclass field."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

METADATA = "key"
AUTO_OR_BOOL = ("auto", "true", "false")  # choices of a boolean that can be chosen when a run starts


@dataclass(frozen=True)
class Key:
    """Meaning of one configuration key.

    Attributes:
        text: one line with its unit, for --help and docs/reference.md.
        choices: allowed values; of a list, of each item.
        within: allowed numbers, an interval as in mathematics: "[0, 1)" holds 0 and not 1. Of a list, of each item.
        word: a word that is allowed besides whole numbers, like `auto` for a value that is chosen when a run starts.
        read_by: the group value that reads it, "optimizer=muon" or "teacher_cache=topk,sampled", or a name in
            launch/config/unused_keys.py; empty: every run.
        on_resume: whether a resumed run may be given another value.
        by_size: whether `auto`, its default, stands for a value by the size of the model
            (launch/config/size_defaults.py).
        of_machine: whether it decides where a run computes; a resumed run then chooses anew for its machine.
        free_text: whether its value is text as typed, whatever Hydra's grammar makes of it.
    """

    text: str
    choices: Collection[str] = ()
    within: str = ""
    read_by: str = ""
    on_resume: bool = False
    of_machine: bool = False
    free_text: bool = False
    by_size: bool = False
    word: str = ""


def key(
    text: str,
    default: Any = MISSING,
    *,
    factory: Callable[[], Any] | Any = MISSING,
    choices: Collection[str] = (),
    within: str = "",
    read_by: str = "",
    on_resume: bool = False,
    of_machine: bool = False,
    free_text: bool = False,
    by_size: bool = False,
    word: str = "",
) -> Any:
    """Declare a dataclass field that is a configuration key; the arguments are those of `Key`."""
    meaning = Key(text, choices, within, read_by, on_resume or of_machine, of_machine, free_text, by_size, word)
    return dataclasses.field(default=default, default_factory=factory, metadata={METADATA: meaning})


def same_key(kind: type, name: str, default: Any = MISSING) -> Any:
    """Declare a field that is the same key as that of another dataclass; its default may differ."""
    return dataclasses.field(default=default, metadata={METADATA: dict(keys_of(kind))[name]})


def keys_of(kind: type, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Yield (dotted name, meaning) of every key of a settings dataclass, those of nested dataclasses included."""
    hints = get_type_hints(kind)
    for item in fields(kind):
        name = f"{prefix}{item.name}"
        if METADATA in item.metadata:
            yield name, item.metadata[METADATA]
        if is_dataclass(hints[item.name]):
            yield from keys_of(hints[item.name], f"{name}.")


def is_within(value: float, interval: str) -> bool:
    """Whether a number lies in an interval such as "(0, 1]"; inf and nan lie in none."""
    low, high = bounds(interval)
    if not math.isfinite(value) or not low <= value <= high:
        return False
    return not (value == low and interval.startswith("(")) and not (value == high and interval.endswith(")"))


def format_readers(read_by: str) -> str:
    """Return the group values of `Key.read_by` in words: "only loss=jsd reads it"."""
    group, _, values = read_by.partition("=")
    *others, last = [f"{group}={value}" for value in values.split(",")]
    return f"only {', '.join(others)} and {last} read it" if others else f"only {last} reads it"


def bounds(interval: str) -> tuple[float, float]:
    """Ends of an interval."""
    low, high = interval.strip("[]()").split(",")
    return _number(low), _number(high)


def _number(text: str) -> float:
    """Whole numbers are exact: a float has not every one above 2^53."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        return int(value) if value.is_integer() else value
