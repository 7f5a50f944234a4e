"""Spelling suggestions for error messages."""

import difflib
from collections.abc import Iterable


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return ` (did you mean …?)` with the most similar allowed name, or "" if none is similar.

    A key of a group is found by its last part too: top_k → sampling.top_k.
    """
    names = list(allowed)
    matches = [name for name in names if name.endswith(f".{given}")] or difflib.get_close_matches(given, names, n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""
