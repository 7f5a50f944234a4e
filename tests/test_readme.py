"""README and docs: every command they show is one that train.py, evaluate.py, generate.py or make understands."""

import re
import shlex
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

import evaluate
import generate
from launch.checks import checks
from launch.config import run_spec
from launch.config.key_value_cli import parse
from tests.support.configurations import composed, prepared, resolved

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(start: str, texts: Iterable[str] = ()) -> list[str]:
    """Indented lines of the pages that begin with `start`, continuation lines joined, comments cut off."""
    found = []
    for text in texts or [page.read_text() for page in PAGES]:
        text = text.replace("\\\n", " ")
        found += [line.strip() for line in text.splitlines() if line.startswith(f"    {start}")]
    return sorted({" ".join(line.split("  # ")[0].split()) for line in found})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the pages speak of."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "pairs.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", commands("python train.py"))
def test_a_train_command_of_the_pages_passes_the_checks(command: str, home: Path) -> None:
    words = shlex.split(command)[2:]
    if "resume=" in command or "--cfg" in command:
        pytest.skip("continues or prints; the rest of the command stands elsewhere on the page")
    # Of a sweep the first job is checked; of a search one at the lower bounds.
    words = [re.sub(r"interval\((.*),.*\)", r"\1", word) for word in words]
    overrides = [word.split(",")[0] for word in words if word != "-m" and not word.startswith("hparams_search")]
    config = composed(*overrides)
    sweep = "sweep" if "-m" in shlex.split(command) else ""
    config = replace(config, invocation=replace(config.invocation, sweep=sweep))
    if config.baseline:
        run = home / config.baseline
        run.mkdir(parents=True)
        (run / "report.json").write_text('{"status": "finished", "val_loss": 4.0}')
        run_spec.save(prepared(resolved(replace(config, accelerator="cpu"))), run / "config.yaml")
    checks.check(config)


def test_the_commands_for_gpus_have_a_sequence_for_each_of_eight() -> None:
    section = (ROOT / "README.md").read_text().partition("## On GPUs")[2].partition("\n## ")[0]
    given = commands("python train.py", [section])
    assert len(given) >= 4
    for command in given:
        checks.check_batch(composed(*shlex.split(command)[2:], "accelerator=gpu", "devices=8"))


@pytest.mark.parametrize("command", commands("python evaluate.py"))
def test_an_evaluate_command_of_the_pages_parses(command: str) -> None:
    parse(shlex.split(command)[2:], evaluate.Arguments)


@pytest.mark.parametrize("command", commands("python generate.py"))
def test_a_generate_command_of_the_pages_parses(command: str) -> None:
    parse(shlex.split(command)[2:], generate.Arguments)


@pytest.mark.parametrize("target", sorted({command.split()[1] for command in commands("make ")}))
def test_a_make_target_of_the_pages_exists(target: str) -> None:
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_every_group_value_stands_in_the_readme() -> None:
    rows = re.findall(r"^\| `(\w+)`[^|]*\| (.*) \|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    told: dict[str, str] = {}
    for group, values in rows:
        told[group] = told.get(group, "") + " " + values
    for path in (ROOT / "conf").glob("*/*.yaml"):
        assert re.search(rf"\b{path.stem}\b", told[path.parent.name]), f"{path.parent.name}={path.stem}"


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} → {target}"
