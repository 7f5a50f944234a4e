"""Path patterns: what exists is taken literally, `[` `]` `*` `?` included; anything else is a glob."""

import os
from glob import glob
from pathlib import Path


def matching_paths(pattern: str) -> list[Path]:
    """Return the path if it exists, else the paths that match it as a glob (`**`: any folders), sorted.

    The longest part that is an existing folder is taken literally: `runs[1]/*.txt` are the text files in `runs[1]`.
    """
    path = Path(pattern).expanduser()
    if os.path.exists(path):  # noqa: PTH110 — False, not an error, for several paths that are too long for one
        return [path]
    folder = next((parent for parent in path.parents if os.path.isdir(parent)), Path())  # noqa: PTH112 — the same
    names = glob(str(path.relative_to(folder)), root_dir=folder, recursive=True)  # noqa: PTH207 — with **
    return sorted(folder / name for name in names)
