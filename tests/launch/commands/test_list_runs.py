"""list_runs: every run below a folder with its status and how to continue it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2lab.errors import InputError
from launch.commands.list_runs import find_runs, format_age, main
from tests.conftest import ROOT, Train

HOLD = """
import sys
from pathlib import Path
from gpt2lab.storage.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_list_names_status_step_score_and_resume_command(
    train_here: Train, tiny: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_here(*tiny, "steps=4", "run_dir=runs/finished").code == 0
    for name in ("interrupted", "no checkpoint", "not started", "in use"):
        shutil.copytree("runs/finished", f"runs/{name}")
        Path(f"runs/{name}/report.json").unlink()
    for name in ("no checkpoint", "not started"):
        shutil.rmtree(f"runs/{name}/checkpoints")
    Path("runs/not started/metrics.csv").unlink()
    command = [sys.executable, "-c", HOLD, str(Path("runs/in use").absolute())]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        found = {run.folder.name: run for run in find_runs(Path("runs"))}
        holder.communicate()
    assert {name: run.status for name, run in found.items()} == {
        "finished": "finished",
        "interrupted": "interrupted",
        "no checkpoint": "no checkpoint",
        "not started": "not started",
        "in use": "running",
    }
    assert {(run.step, run.steps) for name, run in found.items() if name != "not started"} == {(4, 4)}
    assert found["not started"].step == 0
    assert found["finished"].metric == "val/loss"
    assert found["finished"].value is not None
    monkeypatch.setattr(sys, "argv", ["list_runs"])
    capfd.readouterr()
    main()
    lines = capfd.readouterr().out.splitlines()
    assert [line.strip() for line in lines if "resume=" in line].count("python train.py resume='runs/not started'") == 1
    assert not any("resume=runs/finished" in line for line in lines)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(InputError, match="root=nowhere: there is no such folder"):
        find_runs(Path("nowhere"))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.9, "59 s"), (90, "1 min"), (7_200, "2 h"), (9e5, "10 d")]
)
def test_age_is_in_its_largest_unit(seconds: float, text: str) -> None:
    assert format_age(seconds) == text


def test_piped_list_has_each_run_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("a long name " * 12).strip()
    folder.mkdir()
    (folder / "config.yaml").write_text("config:\n  steps: 4\n")
    monkeypatch.setattr(sys, "argv", ["list_runs", f"root={tmp_path}"])
    main()
    assert any(line.startswith(f"{folder}  not started") for line in capfd.readouterr().out.splitlines())
