"""make: what each target installs before it runs."""

import subprocess

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
