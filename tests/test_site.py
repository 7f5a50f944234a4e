"""The documentation site: it builds without warnings and without a network; tutorials and notebooks run as they are."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("mkdocs")

from docs import run_tutorials, site_hooks

NOTEBOOKS = run_tutorials.NOTEBOOKS
LOADED = re.compile(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*\shref=\"?https?:")  # from a server
MOST_BYTES = 300_000  # of a notebook with its outputs


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("data.md", "(runs.md#locks)", "(runs.md#locks)"),
        ("data.md", "(../gpt2lab/keys.py)", "(source/gpt2lab/keys.py.md)"),
        ("data.md", "(../README.md#links)", "(source/README.md#links)"),
        ("measurements/tasks.md", "(../../benchmarks/RESULTS.md)", "(../source/benchmarks/RESULTS.md)"),
        ("tutorials/distill.md", "(../notebooks/tour.ipynb)", "(../notebooks/tour.md)"),
        ("source/README.md", "(docs/data.md#pairs)", "(../data.md#pairs)"),
        ("source/README.md", "(docs/images/run.webp)", "(../images/run.webp)"),
        ("data.md", "(https://optuna.org)", "(https://optuna.org)"),
    ],
)
def test_links_for_github_become_links_of_the_site(page: str, link: str, expected: str) -> None:
    assert site_hooks.with_site_links(page, f"[text]{link}") == f"[text]{expected}"


@pytest.mark.slow
def test_the_site_builds_strictly_and_needs_no_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    inherited = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # as in the Makefile: not of our pages
    built = subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    for page in tmp_path.rglob("*.html"):
        assert not LOADED.search(page.read_text()), page
        assert 'class="mermaid"' not in page.read_text(), "Material loads mermaid from a server"
    index = json.loads((tmp_path / "search/search_index.json").read_text())
    assert any("temperature" in entry["text"] for entry in index["docs"])
    assert (tmp_path / "search/search_index.js").is_file(), "the search works in pages that are opened from a folder"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tutorials_run_in_their_order() -> None:
    """Every command as it is written, with fewer steps and texts."""
    folder = run_tutorials.working_copy()

    def run(commands: str) -> str:
        return run_tutorials.run_commands(re.sub(r"\b(steps|texts)=\d+", r"\1=4", commands), folder)

    for page in run_tutorials.TUTORIALS:
        new = run_tutorials.renewed(page.read_text(), run)
        assert len(run_tutorials.COMMANDS.findall(new)) == len(run_tutorials.COMMANDS.findall(page.read_text()))
        assert all((folder / html).is_file() for html, _ in run_tutorials.PICTURE.findall(new))


def test_stored_notebooks_have_outputs_and_are_small() -> None:
    assert len(NOTEBOOKS) == 2
    for file in NOTEBOOKS:
        cells = json.loads(file.read_text())["cells"]
        assert file.stat().st_size < MOST_BYTES
        assert sum(bool(cell.get("outputs")) for cell in cells) >= 5
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        assert not [each for each in outputs if each["output_type"] == "error" or each.get("name") == "stderr"]
        assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code"), "run all cells"


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTEBOOK_STEPS", "4")
    stored = [cell.source for cell in run_tutorials.run_notebook(file).cells]
    assert stored
