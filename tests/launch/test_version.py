"""--version names this project and the packages that determine a run's results."""

import importlib
import sys
from importlib import metadata

import pytest


@pytest.mark.parametrize("program", ["train", "evaluate", "generate"])
def test_version_is_of_this_project_and_its_packages(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{program}.py", "--version"])
    importlib.import_module(program).command_line()
    own, packages = capsys.readouterr().out.splitlines()
    assert own.startswith("gpt2-lab ")
    for package in ("torch", "lightning", "transformers", "hydra-core", "wandb"):
        assert f"{package} {metadata.version(package)}" in packages
