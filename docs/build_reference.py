"""Writes docs/reference.md from the comments in conf/, and the README's tree of files from the modules' first lines.

python -m docs.build_reference            rewrite both (make docs)
python -m docs.build_reference --check    exit code 1 where one is out of date
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
PAGE = ROOT / "docs" / "reference.md"
README = ROOT / "README.md"
TREE = re.compile(r"(?<=<!-- written by make docs -->\n).*?(?=<!-- end -->)", re.DOTALL)
FOLDERS = ("launch", "lightning_modules", "datamodules", "callbacks", "gpt2lab", "hydra_plugins", "benchmarks", "docs")
NOT_PYTHON = {
    "launch/generate/playground.html": "the page of serve=true, with its style and script",
    "conf/": "values only, a folder for each group; docs/reference.md says what each is",
    "tests/": "promises, kept by real runs on tiny sizes",
    "setup.sh, Makefile, .ci/run": "the environment, the commands, what a change must pass",
    "requirements*.txt": "what is imported, what the tests need, and the lock of what these bring along",
}
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


def what_it_is(path: Path) -> str:
    """The opening comment up to the command that uses the value."""
    lines = opening_comment(path)
    end = next((number for number, line in enumerate(lines) if line.lstrip().startswith("python ")), len(lines))
    return " ".join(line.strip() for line in lines[:end])


def default_values() -> dict[str, str]:
    """Group → default value, from the defaults list of conf/train.yaml."""
    pairs = re.findall(r"^  - (\w+): (\w+)$", (CONF / "train.yaml").read_text(), flags=re.MULTILINE)
    return dict(pairs)


def group_section(folder: Path, default: str | None) -> str:
    rows = [f"## {folder.name}", "", "| value | |", "|---|---|"]
    for path in sorted(folder.glob("*.yaml")):
        says = what_it_is(path).replace("|", "\\|")
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


def first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    return docstring.splitlines()[0].rstrip(".") if docstring else ""


def tree() -> str:
    """Every module with the first line of its docstring."""
    entries = [(path.name, first_line(path)) for path in sorted(ROOT.glob("*.py"))]
    for folder in FOLDERS:
        entries.append((f"{folder}/", ""))
        files = [path for path in sorted((ROOT / folder).rglob("*.py")) if first_line(path)]
        entries += [(f"  {path.relative_to(ROOT / folder)}", first_line(path)) for path in files]
    entries += NOT_PYTHON.items()
    width = max(len(name) for name, _ in entries) + 2
    return "\n".join(["```text", *(f"{name:<{width}}{says}".rstrip() for name, says in entries), "```\n"])


def main(arguments: list[str]) -> int:
    fresh = {PAGE: page(), README: TREE.sub(lambda _: tree(), README.read_text())}
    if arguments == ["--check"]:
        stale = [path.name for path, text in fresh.items() if not path.is_file() or path.read_text() != text]
        if stale:
            print(f"Out of date: {', '.join(stale)}. Run: make docs", file=sys.stderr)
        return 1 if stale else 0
    if arguments:
        print(f"Unknown arguments {' '.join(arguments)}; allowed: --check", file=sys.stderr)
        return 2
    for path, text in fresh.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
