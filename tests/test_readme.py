"""README and docs: every command they show is one that train.py, evaluate.py, generate.py or make understands."""

import re
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import open_dict

import evaluate
import generate
from launch.checks import checks
from launch.config import schema
from launch.config.cli_overrides import readable_by_hydra
from launch.config.key_value_cli import parse

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
    schema.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        tree = compose("train", overrides=readable_by_hydra(overrides), return_hydra_config=True)
    with open_dict(tree):
        hydra_node = tree.pop("hydra")
    settings = schema.typed(tree, hydra_node, command=command)
    settings.record.sweep = "sweep" if "-m" in shlex.split(command) else ""
    if settings.baseline:
        run = home / settings.baseline
        run.mkdir(parents=True)
        (run / "report.json").write_text('{"status": "finished", "val_loss": 4.0}')
        schema.save(settings, run / "config.yaml")
    checks.check(settings)


def test_the_commands_for_gpus_have_a_sequence_for_each_of_eight() -> None:
    section = (ROOT / "README.md").read_text().partition("## On GPUs")[2].partition("\n## ")[0]
    given = commands("python train.py", [section])
    assert len(given) >= 4
    schema.register()
    for command in given:
        words = [*shlex.split(command)[2:], "accelerator=gpu", "devices=8"]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            tree = compose("train", overrides=readable_by_hydra(words), return_hydra_config=True)
        with open_dict(tree):
            hydra_node = tree.pop("hydra")
        checks.check_batch(schema.typed(tree, hydra_node, command=command))


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
