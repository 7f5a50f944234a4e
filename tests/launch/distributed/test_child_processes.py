"""Child processes import the project, PYTHONPATH and what is installed, never the working directory."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.distributed import child_processes
from tests.conftest import ROOT, environment

SHADOWS = ("random", "queue", "types", "statistics", "socket", "torch", "train", "callbacks", "launch", "hydra_plugins")
LAUNCHERS = {
    "job": ["-m", "seed=1,2"],
    "ranks": ["devices=2", "strategy=ddp", "run_dir=run"],
    "SLURM": ["launcher=slurm", "launcher.executor=local", "accelerator=cpu", "run_dir=run"],
    "Ray": ["launcher=ray", "accelerator=cpu", "run_dir=run"],
}


@pytest.fixture
def shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a user's modules that have names of this project and of the standard library."""
    folder = tmp_path / "work"
    for name in SHADOWS:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise SystemExit('the {name} of the working directory')")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("given", [None, "", ":", "{user}", ":{user}", "{user}::", "{root}:{user}"])
def test_a_child_never_imports_from_the_working_directory(
    given: str | None, shadowed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "mypackage.py").write_text("")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if given is not None:
        monkeypatch.setenv("PYTHONPATH", given.format(user=tmp_path / "user", root=ROOT))
    program = "import random, queue, types, statistics, socket, callbacks, launch; print(launch.__path__[0])"
    program += "; import mypackage" if given and "user" in given else ""
    (tmp_path / "program.py").write_text(program)
    for command in (["-c", program], [str(tmp_path / "program.py")]):
        ended = subprocess.run(
            [sys.executable, *command], env=child_processes.environment(), capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.strip() == str(ROOT / "launch")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_trains_beside_modules_of_the_user(
    launcher: str, shadowed: Path, cache: Path, tiny: list[str], tmp_path: Path
):
    user = tmp_path / "user"
    user.mkdir()
    (user / "mypackage.py").write_text("import lightning\nclass Quiet(lightning.Callback):\n    pass\n")
    command = [sys.executable, str(ROOT / "train.py"), *tiny, "steps=2", *LAUNCHERS[launcher]]
    command += ["+callbacks.quiet._target_=mypackage.Quiet", "allow_targets=[mypackage]"]
    variables = {**environment(cache), "PYTHONPATH": str(user)}
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "finished: val/loss" in ended.stdout


def test_torchrun_ranks_train_beside_modules_of_the_user(shadowed: Path, cache: Path, tiny: list[str]):
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [str(torchrun), "--standalone", "--nproc-per-node=2", str(ROOT / "train.py"), *tiny, "steps=2"]
    ended = subprocess.run(command, env=environment(cache), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
