"""Allowed values of a key: the check of a given value, and the text that lists what is allowed."""

import math
from typing import Any

from gpt2lab.errors import InputError
from gpt2lab.keys import Key, bounds, is_within
from launch.config.did_you_mean import nearest


def check_value(name: str, meaning: Key, given: Any, as_typed: str = "") -> None:
    """Compare one value, or one element of a list, with what its key allows.

    Args:
        as_typed: text of the value for the message.

    Raises:
        InputError: it is not allowed; the message lists the choices or the interval.
    """
    written = str(given).lower() if str(given) in ("True", "False") else str(given)
    if meaning.choices and written not in meaning.choices:
        near = nearest(written, meaning.choices)
        raise InputError(f"{name}={written}: no such value{near}.\nAllowed: {', '.join(meaning.choices)}.")
    if meaning.word:
        _check_word(name, meaning, given)
    elif meaning.within and not is_within(given, meaning.within):
        finite = " and finite" if not math.isfinite(given) else ""
        raise InputError(
            f"{name}={as_typed or given} is out of range: it must be {format_interval(meaning.within)}{finite}."
        )


def format_allowed(meaning: Key) -> str:
    """Return the choices or the interval in words, with its word; nothing where every value of the type is allowed."""
    if meaning.choices:
        return ", ".join(meaning.choices)
    interval = format_interval(meaning.within) if meaning.within else ""
    word = "auto" if meaning.by_size else meaning.word
    return f"{word}, or {interval}" if word else interval


def format_interval(interval: str) -> str:
    """Return an interval in words: "[0, 1)" → at least 0 and below 1."""
    low, high = bounds(interval)
    ends = []
    if low != -math.inf:
        ends.append(f"greater than {low}" if interval.startswith("(") else f"at least {low}")
    if high != math.inf:
        ends.append(f"below {high}" if interval.endswith(")") else f"at most {high}")
    return " and ".join(ends) or "a number"


def _check_word(name: str, meaning: Key, given: Any) -> None:
    """Check a key that is a whole number or one word."""
    is_number = isinstance(given, int) and not isinstance(given, bool)
    if given != meaning.word and not (is_number and is_within(given, meaning.within)):
        allowed = format_interval(meaning.within)
        raise InputError(f"{name}={given} is neither {meaning.word} nor a whole number: {allowed}.")
