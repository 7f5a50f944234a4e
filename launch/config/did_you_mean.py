"""Spelling: the nearest valid name to a misspelt one."""

import difflib
from collections.abc import Iterable


def nearest(given: str, allowed: Iterable[str]) -> str:
    """` (did you mean …?)` where an allowed name is near, else nothing."""
    matches = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""
