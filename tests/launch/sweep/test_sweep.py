"""A multirun: one run directory per job, a table at the end, and no job that stops another."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn

from gpt2lab.storage.report_json import read_report
from launch.sweep import grid
from tests.conftest import ROOT, Train, environment, started


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def empty_text(tmp_path: Path) -> str:
    """An override that names a folder without any text."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file.txt").touch()
    return "path=empty"


@pytest.mark.slow
def test_error_common_to_all_starts_is_found_in_one_process(
    train_process: Train, tiny: list[str], empty_text: str, tmp_path: Path
):
    keys = [key for key in tiny if not key.startswith("path=")]
    answer = train_process(*keys, "-m", empty_text, "seed=1,2,3", "hydra.sweep.dir=swept")
    assert (answer.code, answer.stdout) == (2, "")
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("no document with any text") == 1
    assert not (tmp_path / "swept").exists()


def test_a_failed_job_does_not_stop_the_rest(jobs_here: None, train_here: Train, tiny: list[str], tmp_path: Path):
    """Two jobs are invalid; the other two are trained, each in a separate folder."""
    sweep = ["-m", "steps=2", "optimizer=adamw,adamv", "init=scratch,no/such/run", "hydra.sweep.dir=swept"]
    answer = train_here(*tiny, *sweep)
    assert answer.code == 1
    assert answer.stderr.strip().endswith("3 of 4 jobs failed.")
    table = rows(tmp_path / "swept")
    assert [row["status"] for row in table] == ["finished", "failed", "failed", "failed"]
    assert "no such folder" in table[1]["error"]
    assert "adamv" in table[2]["error"]
    report = json.loads((tmp_path / "swept" / "0" / "report.json").read_text())
    assert float(table[0]["watched"]) == report["val_loss"]
    assert table[0]["watched_metric"] == "val/loss"
    assert not (tmp_path / "swept" / "1").exists()
    assert not (tmp_path / "runs").exists()
    lines = answer.stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("folder  status"))
    assert "optimizer=adamw init=scratch" in lines[start + 1]
    assert "finished" in lines[start + 1]
    assert "data=text" not in lines[start + 1], "what all jobs share is no news"


def test_the_error_of_a_job_process_reaches_the_table(
    start_check_here: None, train_here: Train, tiny: list[str], empty_text: str, tmp_path: Path
):
    keys = [key for key in tiny if not key.startswith("path=")]
    answer = train_here(*keys, "-m", empty_text, "devices=1,64", "n_jobs=2", "hydra.sweep.dir=swept")
    assert answer.code == 1, answer.stderr
    table = rows(tmp_path / "swept")
    assert [row["status"] for row in table] == ["failed"] * 2
    assert "no document with any text" in table[0]["error"]
    assert "devices=64" in table[1]["error"]


def test_a_key_of_one_task_is_dropped_for_the_other(
    jobs_here: None, train_here: Train, tiny: list[str], tmp_path: Path
):
    """`hydra.mode=MULTIRUN` is a multirun without -m."""
    sweep = ["hydra.mode=MULTIRUN", "steps=2", "task=pretrain,distill", "teacher=missing/run", "hydra.sweep.dir=swept"]
    answer = train_here(*tiny, *sweep)
    assert answer.code == 1
    first, second = rows(tmp_path / "swept")
    assert (first["status"], second["status"]) == ("finished", "failed")
    assert "missing/run" in second["error"]
    stored = (tmp_path / "swept" / "0" / "config.yaml").read_text()
    assert "missing/run" not in stored


@pytest.mark.slow
def test_the_task_of_a_job_may_come_from_its_experiment(train_process: Train, tiny: list[str], tmp_path: Path):
    """A key read by distillation alone is no error in pretraining."""
    sweep = ["-m", "steps=2", "experiment=none,distilgpt2_owt", "teacher=missing/run", "schedule.warmup_steps=1"]
    assert train_process(*tiny, *sweep, "hydra.sweep.dir=swept").code == 1
    first, second = rows(tmp_path / "swept")
    assert first["status"] == "finished", first["error"]
    assert "missing/run" in second["error"]


def test_sweep_over_tasks_needs_its_teacher(train_here: Train, tiny: list[str]):
    answer = train_here(*tiny, "-m", "task=pretrain,distill")
    assert answer.code == 2
    assert "teacher=RUN_DIR" in answer.stderr
    assert len(answer.stderr.strip().splitlines()) <= 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stpes=3"], "did you mean steps?"),
        (["optimizer.lr=-1"], "optimizer.lr=-1.0 is out of range"),
        (["optimizer=adamv"], "adamv"),
        (["path=nowhere"], "path=nowhere: there is no such file"),
        (["init=no/such/run"], "init=no/such/run: there is no such folder"),
        (["task=distill", "teacher=no/such/run"], "teacher=no/such/run: there is no such folder"),
        (["task=pretrain,distill", "teacher=no/such/run", "init=no/such/run"], "init=no/such/run"),
        (["context=33"], "context=33"),
        (["path=empty"], "no document with any text"),
        (["devices=64", "batch_tokens=2048"], "devices=64: there are"),
        (["hparams_search=optuna", "optimizer.lr=interval(1e-4,1e-2)", "path=empty"], "no document with any text"),
        (["hparams_search=optuna", "optimizer.lr=interval(1e-4,1e-2)", "path=nowhere"], "path=nowhere"),
        (["hparams_search=optuna", "optimizer.lr=interval(1e-4,1e-2)", "init=no/such/run"], "init=no/such/run"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_error_common_to_all_jobs_is_reported_once(
    overrides: list[str],
    message: str,
    start_check_here: None,
    train_here: Train,
    tiny: list[str],
    empty_text: str,
):
    """It is found before the first job, and the sweep leaves no folder behind."""
    given = {override.partition("=")[0] for override in overrides}
    keys = [key for key in tiny if key.partition("=")[0] not in given]
    answer = train_here(*keys, "-m", "seed=1,2", *overrides, "hydra.sweep.dir=swept")
    assert answer.code == 2
    assert answer.stderr.count(message) == 1
    assert answer.stderr.startswith("error: ")
    assert len(answer.stderr.splitlines()) <= 5
    assert "job 0" not in answer.stdout
    assert not Path("swept").exists()


def test_run_dir_is_refused_in_a_sweep(train_here: Train):
    answer = train_here("-m", "seed=1,2", "run_dir=here")
    assert answer.code == 2
    assert "hydra.sweep.dir" in answer.stderr


def test_sweep_does_not_overwrite_another_one(jobs_here: None, train_here: Train, tiny: list[str], tmp_path: Path):
    """Neither the same command nor another grid or search in its folder changes its results."""
    sweep = [*tiny, "-m", "steps=2", "hydra.sweep.dir=swept"]
    first = train_here(*sweep, "seed=1", "n_jobs=1")
    assert first.code == 0, first.stderr
    before = (tmp_path / "swept" / "sweep.csv").read_bytes()
    for more, says in (
        (["seed=1"], "contains a sweep already"),
        (["seed=2,3", "resume=auto"], "contains another sweep: its job 0 has seed=1"),
        (["seed=1,2", "resume=auto", "hparams_search=optuna"], "without an Optuna study (study.db)"),
    ):
        refused = train_here(*sweep, *more)
        assert refused.code == 2, refused.stderr
        assert says in refused.stderr
        assert (tmp_path / "swept" / "sweep.csv").read_bytes() == before
    longer = train_here(*sweep, "seed=1,2", "resume=auto")
    assert longer.code == 0, longer.stderr
    assert [row["status"] for row in rows(tmp_path / "swept")] == ["finished"] * 2
    assert train_here("resume=swept/0", "steps=4").code == 0
    assert train_here(*sweep, "seed=1,2", "resume=auto").code == 1
    first, second = rows(tmp_path / "swept")
    assert (first["status"], second["status"]) == ("failed", "finished")
    assert "swept/0 was continued separately with steps=4" in first["error"]


@pytest.mark.slow
def test_sweeper_receives_the_val_loss_of_each_job(
    train_here: Train, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Hydra passes the launcher's results to its sweepers."""
    returned: list[JobReturn] = []

    def noting(*arguments: Any) -> list[JobReturn]:
        returned.extend(run_grid(*arguments))
        return returned

    run_grid = grid.run_grid
    monkeypatch.setattr(grid, "run_grid", noting)
    assert train_here(*tiny, "-m", "steps=2", "optimizer.lr=0.0001,0.01", "hydra.sweep.dir=swept").code == 0
    losses = [read_report(tmp_path / "swept" / job)["val_loss"] for job in ("0", "1")]
    assert losses[0] != losses[1]
    assert [job.return_value for job in returned] == losses


def running_job(folder: Path, process: subprocess.Popen[str]) -> int:
    """Process id of a job that has begun to train."""
    while process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        metrics = folder / "0" / "metrics.csv"
        if children and metrics.is_file() and metrics.stat().st_size:
            return int(children[0])
        time.sleep(0.05)
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.chaos), signal.SIGINT])
def test_jobs_end_with_their_parent(number: int, cache: Path, tiny: list[str], tmp_path: Path):
    """A killed parent leaves no process; on an interrupt its job saves first and the next one does not start."""
    command = [*tiny, "-m", "steps=100000", "compile=false", "seed=1,2", "log_every=1", "hydra.sweep.dir=swept"]
    process = started(cache, tmp_path, *command)
    job = running_job(tmp_path / "swept", process)
    process.send_signal(number)
    process.communicate(timeout=200)
    while Path(f"/proc/{job}").exists():
        time.sleep(0.05)
    assert not (tmp_path / "swept" / "1").exists()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert rows(tmp_path / "swept")[0]["status"] == "stopped"
        assert list((tmp_path / "swept" / "0" / "checkpoints").glob("step-*.ckpt"))


@pytest.mark.chaos
def test_a_killed_job_is_recorded_and_the_next_one_starts(cache: Path, tiny: list[str], tmp_path: Path):
    code, stderr = ended_by(signal.SIGKILL, cache, tiny, tmp_path)
    assert code == 1, stderr
    table = rows(tmp_path / "swept")
    assert [row["status"] for row in table] == ["failed", "finished"]
    assert table[0]["error"] == "killed by SIGKILL"


@pytest.mark.chaos
def test_a_sweep_in_which_a_job_was_stopped_is_not_finished(cache: Path, tiny: list[str], tmp_path: Path):
    code, stderr = ended_by(signal.SIGTERM, cache, tiny, tmp_path)
    assert code == 75, stderr
    assert "1 of 2 jobs were stopped. Continue with: python train.py" in stderr
    assert [row["status"] for row in rows(tmp_path / "swept")] == ["stopped", "finished"]


def ended_by(number: int, cache: Path, tiny: list[str], folder: Path) -> tuple[int, str]:
    """Return (exit code, stderr) of a sweep of two jobs; the first receives a signal."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *tiny, "-m", "steps=100000,2", "log_every=1", "hydra.sweep.dir=swept"],
        cwd=folder,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.kill(running_job(folder / "swept", process), number)
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


def test_sweep_over_seeds_prints_settings_and_best_command(
    jobs_here: None, train_here: Train, tiny: list[str], tmp_path: Path
):
    sweep = ["-m", "steps=2", "optimizer.lr=0.0001,0.01", "seed=1,2", "hydra.sweep.dir=swept", "resume=auto"]
    sweep += [f"n_jobs={min(2, len(os.sched_getaffinity(0)))}"]  # a separate run has neither
    ended = train_here(*tiny, *sweep)
    assert ended.code == 0, ended.stderr
    table = rows(tmp_path / "swept")
    assert [(row["optimizer.lr"], row["seed"]) for row in table] == [
        ("0.0001", "1"),
        ("0.0001", "2"),
        ("0.01", "1"),
        ("0.01", "2"),
    ]
    assert "lr=0.01" in (tmp_path / "swept" / "sweep.html").read_text()
    lines = ended.stdout.splitlines()
    assert sum("  2 finished  " in line for line in lines) == 2, "a line for each setting"
    (command,) = (line for line in lines if line.startswith("  python train.py "))
    _, program, *words = shlex.split(command)
    assert program == "train.py"
    assert train_here(*words, "run_dir=again").code == 0
    repeated = json.loads((tmp_path / "again" / "report.json").read_text())["val_loss"]
    best = min(table, key=lambda row: float(row["watched"]))
    of_its_setting = [row for row in table if row["optimizer.lr"] == best["optimizer.lr"]]
    assert f"{repeated:.4f}" in [f"{float(row['watched']):.4f}" for row in of_its_setting]
    assert command.strip() in [row["command"] for row in of_its_setting]
