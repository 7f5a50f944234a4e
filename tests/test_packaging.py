"""pip: the wheel is built, installed into a fresh environment and trains from an empty folder outside the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import ROOT, SHRUNK, environment

LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "runs", "sweeps", "studies", "outputs", "build", "*.egg-info")


def succeed(*command: str | Path, cwd: Path, variables: dict[str, str]) -> str:
    ended = subprocess.run([*map(str, command)], cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel; dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("packaging")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)  # pip builds within its source
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    build = ("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    succeed(*pip, *build, cwd=folder, variables=variables)
    (wheel,) = folder.glob("*.whl")
    succeed(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder, variables=variables)
    python = folder / "venv" / "bin" / "python"
    succeed(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder, variables=variables)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python.parent


@pytest.mark.slow
def test_an_installed_wheel_trains_outside_the_checkout(installed: Path, sources: Path, cache: Path, tmp_path: Path):
    variables = {name: value for name, value in environment(cache).items() if name != "PYTHONPATH"}
    keys = [*SHRUNK, f"path={sources}", "steps=2", "hydra.sweep.dir=sweep", "seed=1,2"]
    succeed(installed / "gpt2lab-train", "-m", *keys, cwd=tmp_path, variables=variables)
    runs = sorted(path.parent for path in tmp_path.glob("sweep/*/report.json"))
    assert len(runs) == 2
    report = json.loads((runs[0] / "report.json").read_text())
    assert report["status"] == "finished"
    assert report["git"] is None
    scores = succeed(installed / "gpt2lab-evaluate", f"checkpoint={runs[0]}", cwd=tmp_path, variables=variables)
    assert "perplexity" in scores
    prompt = (f"checkpoint={runs[0]}", "prompt=def ", "max_new_tokens=4")
    assert "def " in succeed(installed / "gpt2lab-generate", *prompt, cwd=tmp_path, variables=variables)
    where = "import gpt2lab, launch.config.groups as g; print(gpt2lab.__path__[0], g.CONF, len(g.groups()))"
    package, conf, groups = succeed(installed / "python", "-c", where, cwd=tmp_path, variables=variables).split()
    assert Path(package).is_relative_to(installed.parent)
    assert Path(conf) == Path(package).with_name("conf")
    assert int(groups) == len([path for path in (ROOT / "conf").iterdir() if path.is_dir()])


@pytest.mark.slow
def test_a_wheel_has_every_file_of_the_packages(installed: Path):
    (packages,) = installed.parent.glob("lib/python*/site-packages")
    folders = ("gpt2lab", "lightning_modules", "datamodules", "callbacks", "launch", "hydra_plugins", "conf")
    files = [path for name in folders for path in (ROOT / name).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert [path for path in files if not (packages / path.relative_to(ROOT)).is_file()] == []
    scripts = {path.name for path in (packages / "gpt2lab_scripts").glob("*.py")}
    assert scripts >= {"evaluate.py", "generate.py", "train.py"}
