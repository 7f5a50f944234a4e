"""Run the commands of the tutorials and the notebooks, and store their output in the pages.

python -m docs.run_tutorials              all of them, in some ten minutes: output, pictures, notebooks
python -m docs.run_tutorials tutorials    only those of docs/tutorials; or: notebooks

A page marks the output of a block of commands by `<!-- output: REGEX -->`: the lines that match are stored in the block
below. `<!-- picture: PAGE.html -->` stores a screenshot of a page in the picture below.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# In this order: each reads the runs of those before it.
TUTORIALS = [ROOT / f"docs/tutorials/{name}.md" for name in ("pretrain", "distill", "finetune")]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
COMMANDS = re.compile(
    r"```bash\n(?P<commands>.*?)```\n(?:\n<!-- output: (?P<kept>.*?) -->\n```text\n(?P<output>.*?)```\n)?", re.DOTALL
)
PICTURE = re.compile(r"<!-- picture: (\S+) -->\n!\[[^]]*\]\((\S+)\)")
MOST_LINES = 24
COLUMNS = "100"


def working_copy() -> Path:
    """Return a new folder with links to the files of the repository; runs are written to it."""
    folder = Path(tempfile.mkdtemp())
    for file in ROOT.iterdir():
        if file.name not in ("runs", "sweeps", "studies"):
            (folder / file.name).symlink_to(file)
    return folder


def run_commands(commands: str, folder: Path) -> str:
    """Return the output of a block of commands, run in a folder from `working_copy`.

    Raises:
        RuntimeError: a command failed; the message has its output.
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "-ec", commands],
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": COLUMNS, "WANDB_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ended.returncode:
        raise RuntimeError(f"{commands}{ended.stdout}")
    return ended.stdout.replace(f"{folder}/", "")


def renewed(page: str, run: Callable[[str], str]) -> str:
    """Return a page whose blocks of commands were run in their order, with their new output."""

    def new_block(block: re.Match[str]) -> str:
        output = run(block["commands"])
        if block["kept"] is None:
            return block[0]
        lines = [line.rstrip() for line in output.splitlines() if re.search(block["kept"], line)]
        if not lines:
            raise RuntimeError(f"{block['commands']}no line of the output matches {block['kept']}:\n{output}")
        start = block.start("output") - block.start()
        return block[0][:start] + "\n".join(lines[:MOST_LINES]) + "\n```\n"

    return COMMANDS.sub(new_block, page)


def store_picture(html: Path, picture: Path) -> None:
    """Store a screenshot of the top of a page as .webp."""
    shot = picture.with_suffix(".png")
    options = [
        "--headless",
        "--no-sandbox",
        "--hide-scrollbars",
        "--virtual-time-budget=5000",
        "--window-size=1100,800",
    ]
    subprocess.run(["chromium", *options, f"--screenshot={shot}", html.as_uri()], check=True, capture_output=True)
    Image.open(io.BytesIO(shot.read_bytes())).save(picture, quality=70)
    shot.unlink()


def run_notebook(file: Path) -> nbformat.NotebookNode:
    """Return the notebook with the outputs of a new run in its own folder, without stderr: warnings and bars.

    Raises:
        CellExecutionError: a cell raised an error.
    """
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(file.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # its times
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main(arguments: list[str]) -> int:
    if len(arguments) > 1 or not {*arguments} <= {"tutorials", "notebooks"}:
        print(f"Unknown arguments {' '.join(arguments)}; allowed: tutorials or notebooks", file=sys.stderr)
        return 2
    if "notebooks" not in arguments:
        folder = working_copy()
        for page in TUTORIALS:
            page.write_text(renewed(page.read_text(), lambda commands: run_commands(commands, folder)))
            for html, picture in PICTURE.findall(page.read_text()):
                store_picture(folder / html, page.parent / picture)
        shutil.rmtree(folder)
    for file in NOTEBOOKS if "tutorials" not in arguments else []:
        nbformat.write(run_notebook(file), file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
