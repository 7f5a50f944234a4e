"""Writes docs/reference.md: every configuration group, its values and what each is, read from conf/ itself.

python -m docs.build_reference            rewrite the page (make docs)
python -m docs.build_reference --check    exit code 1 where the page is out of date
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
PAGE = ROOT / "docs" / "reference.md"
INTRODUCTION = """# Configuration reference

Written by `make docs` from `conf/`. A value is chosen with `group=value`, a setting inside it with `group.setting=…`:

    python train.py task=distill model=nano optimizer=muon optimizer.lr=2e-3 steps=400

`python train.py --cfg job` prints the whole configuration of a command without running it.
"""


def opening_comment(path: Path) -> list[str]:
    """The comment lines a file opens with, without Hydra's package line."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").removeprefix(" "))
    return comment


def default_values() -> dict[str, str]:
    """Group → default value, from the defaults list of conf/train.yaml."""
    pairs = re.findall(r"^  - (\w+): (\w+)$", (CONF / "train.yaml").read_text(), flags=re.MULTILINE)
    return dict(pairs)


def group_section(folder: Path, default: str | None) -> str:
    rows = [f"## {folder.name}", "", "| value | |", "|---|---|"]
    for path in sorted(folder.glob("*.yaml")):
        says = opening_comment(path)[0].replace("|", "\\|")
        rows.append(f"| `{path.stem}`{' (default)' if path.stem == default else ''} | {says} |")
    return "\n".join(rows)


def plain_keys_section() -> str:
    """The plain keys stand in conf/train.yaml with a comment each; that text is its own best documentation."""
    text = (CONF / "train.yaml").read_text()
    keys = text[text.index("\n\n", text.index("defaults:")) :].split("\nhydra:")[0].strip()
    return f"## Plain keys\n\nWith their defaults, as `conf/train.yaml` has them:\n\n```yaml\n{keys}\n```"


def page() -> str:
    defaults = default_values()
    groups = sorted(path for path in CONF.iterdir() if path.is_dir() and any(path.glob("*.yaml")))
    sections = [group_section(folder, defaults.get(folder.name)) for folder in groups]
    return "\n\n".join([INTRODUCTION.rstrip(), *sections, plain_keys_section()]) + "\n"


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        if PAGE.is_file() and PAGE.read_text() == page():
            return 0
        print("docs/reference.md is out of date; run: make docs", file=sys.stderr)
        return 1
    if arguments:
        print(f"Unknown arguments {' '.join(arguments)}; allowed: --check", file=sys.stderr)
        return 2
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
