"""The example files of docs/extending.md, and registries that are restored after a test."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2lab.settings import DIVERGENCES, OPTIMIZERS, SCHEDULES, TEXT_METRICS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
FILES = re.compile(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", flags=re.DOTALL)


def write_examples(folder: Path) -> list[Path]:
    """Write each code block of the page that names a file in its first line."""
    files = []
    for name, text in FILES.findall(PAGE.read_text()):
        files.append(folder / name)
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        files[-1].write_text(text)
    return files


@contextmanager
def forgetting_plugins() -> Iterator[None]:
    """Remove the block's registrations and imports of `mypkg`, and its changes of the import path."""
    registries, path = (DIVERGENCES, OPTIMIZERS, SCHEDULES, TEXT_METRICS), list(sys.path)
    before = [dict(registry.added) for registry in registries]
    try:
        yield
    finally:
        for registry, added in zip(registries, before, strict=True):
            registry.added = added
        for name in [name for name in sys.modules if name.partition(".")[0] == "mypkg"]:
            del sys.modules[name]
        sys.path[:] = path
