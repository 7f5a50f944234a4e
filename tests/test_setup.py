"""Setup: what each target of make installs before it runs, and the message of programs without the packages."""

import subprocess
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT


def planned(target: str) -> list[str]:
    """Return the commands of a target in a fresh clone."""
    command = ["make", "--dry-run", "--always-make", target]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.parametrize("target", ["setup", "demo", "bench"])
def test_users_do_not_install_development_packages(target: str):
    lines = planned(target)
    assert [line for line in lines if line.endswith("./setup.sh")]
    assert not [line for line in lines if "setup.sh dev" in line]


@pytest.mark.parametrize("target", ["test", "check", "format", "chaos", "docs", "test-all"])
def test_developers_install_both_lists_in_order(target: str):
    setups = [line.rpartition("./")[2] for line in planned(target) if "setup.sh" in line]
    assert setups == ["setup.sh", "setup.sh dev"]


@pytest.mark.parametrize(
    "program", ["train.py", "evaluate.py", "generate.py", "launch/commands/list_runs.py", "launch/commands/compare.py"]
)
def test_program_without_packages_names_the_environment(program: str, tmp_path: Path):
    venv.create(tmp_path, symlinks=True, with_pip=False)
    words = ["-m", program.removesuffix(".py").replace("/", ".")] if "/" in program else [program]
    command = [str(tmp_path / "bin" / "python"), *words, "checkpoint=none"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={}, check=False)
    assert ended.returncode == 2
    first, second = ended.stderr.splitlines()
    assert "has no package hydra, lightning, torch, transformers" in first
    assert "source .venv/bin/activate" in second
