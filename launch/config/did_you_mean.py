"""Spelling suggestions for error messages."""

import difflib
from collections.abc import Iterable


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return ` (did you mean …?)` with the most similar allowed name, or "" if none is similar."""
    matches = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""
