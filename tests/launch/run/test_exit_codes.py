"""Exit codes of a run: 0 finished, 75 stopped and resumable, 130 Ctrl-C, 1 an error."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import callbacks.checkpoint
from gpt2lab.storage.checkpoint_ledger import checkpoint_step, newest_good_checkpoint
from gpt2lab.storage.metrics_csv import read_metrics, series
from gpt2lab.storage.tensor_file import write_tensor_file
from launch import exit_codes
from tests.conftest import ROOT, Train, started
from tests.launch.sweep.test_sweep_on_ranks import marked
from tests.support.stop_signal import stop_keys

HANG = 200  # seconds until a process that should end counts as hanging


def wait_until_training(process: subprocess.Popen[str], run: Path) -> None:
    while process.poll() is None:
        if len(read_metrics(run)) > 1:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate())


def test_ctrl_c_saves_and_the_run_can_be_resumed(tmp_path: Path, tiny: list[str], train_here: Train):
    """In the test process; processes get Ctrl-C in the slow test below and in test_sweep."""
    answer = train_here(*tiny, "steps=10", "log_every=1", "run_dir=run", *stop_keys(steps=3, number=2))
    assert answer.code == 130, answer.stderr
    check_resumed(tmp_path / "run", answer.stderr, train_here, "allow_targets=[tests]")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 75)])
def test_signal_ends_the_run_with_a_resumable_checkpoint(
    number: int, code: int, cache: Path, tmp_path: Path, tiny: list[str], train_here: Train
):
    run = tmp_path / "run"
    process = started(cache, tmp_path, *tiny, "steps=100000", "log_every=1", "run_dir=run")
    wait_until_training(process, run)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=HANG)
    assert process.returncode == code, stderr
    check_resumed(run, stderr, train_here)


def check_resumed(run: Path, stderr: str, train_here: Train, *allowed: str) -> None:
    """Resume a stopped run for three steps; a key that no resume may change is refused."""
    assert stderr.strip().splitlines()[-1].endswith("Continue with: python train.py resume=run")
    report = json.loads((run / "report.json").read_text())
    assert report["status"] == "stopped"
    stopped_at = report["steps"]

    refused = train_here("resume=run", *allowed, "optimizer.lr=1")
    assert refused.code == 2
    assert "optimizer.lr=1 cannot be changed" in refused.stderr
    answer = train_here("resume=run", *allowed, f"steps={stopped_at + 3}")
    assert answer.code == 0, answer.stderr
    report = json.loads((run / "report.json").read_text())
    assert (report["status"], report["steps"]) == ("finished", stopped_at + 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "runs"),
    [
        (["run_dir=run"], ["run"]),
        (["devices=2", "run_dir=run"], ["run"]),
        (["-m", "seed=1,2,3", "n_jobs=2", "hydra.sweep.dir=swept"], ["swept/0", "swept/1"]),
    ],
    ids=["one process", "two ranks", "a sweep"],
)
def test_the_second_ctrl_c_stops_at_once(
    keys: list[str], runs: list[str], cache: Path, tmp_path: Path, tiny: list[str]
):
    # One step lasts for seconds, so both presses fall into it.
    mark = uuid.uuid4().hex
    slow = ["batch_tokens=1048576", "steps=1000", "log_every=1"]
    process = started(cache, tmp_path, *tiny, *slow, *keys, MARK=mark)
    while not all(read_metrics(tmp_path / run) for run in runs):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    time.sleep(0.8)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    logs = [(tmp_path / run).parent / "logs" / f"job-{run[-1]}.txt" for run in runs if run != "run"]
    for printed in [log.read_text() for log in logs] or [stderr]:
        assert "Stopped at once" in printed
    assert not list(tmp_path.rglob("step-*.ckpt"))
    assert not marked(mark)
    assert not (tmp_path / "swept" / "2").exists()


def test_ctrl_c_at_interpreter_shutdown_has_an_exit_code(tmp_path: Path):
    program = "import atexit, time; from launch import exit_codes\n"
    program += "down = lambda: (print('down', flush=True), time.sleep(1000))\n"
    program += "exit_codes.run_and_exit(lambda: atexit.register(down))"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "down\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=HANG)
    assert process.returncode == 130
    assert "Traceback" not in stderr


# Python imports this at its start: the import of the package, once begun, lasts until a signal comes.
LONG_IMPORT = """
import os, sys, time

class Waits:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["PACKAGE"] and (name == "hydra" or "torch" in sys.modules):
            print("importing", flush=True)
            time.sleep(1000)

sys.meta_path.insert(0, Waits())
"""


@pytest.mark.parametrize(
    ("package", "number", "code"),
    [
        ("hydra", signal.SIGINT, 130),
        ("lightning", signal.SIGTERM, 75),
        pytest.param("lightning", signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_before_training_leaves_nothing_behind(
    package: str, number: int, code: int, cache: Path, tmp_path: Path, tiny: list[str]
):
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "sitecustomize.py").write_text(LONG_IMPORT)
    process = started(cache, tmp_path, *tiny, "run_dir=run", PYTHONPATH=str(tmp_path / "planted"), PACKAGE=package)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=HANG)
    assert (process.returncode, "Traceback" in stderr) == (code, False), stderr
    assert not (tmp_path / "run").exists()


def test_a_path_without_permission_is_a_user_error():
    error = exit_codes.as_input_error(PermissionError(13, "Permission denied", "other/run"))
    assert str(error).splitlines()[0] == "Permission denied: other/run"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_run_directory_made_read_only_is_a_user_error(
    code: int, tiny: list[str], train_here: Train, monkeypatch: pytest.MonkeyPatch
):
    def failing(held: Any, path: Path) -> None:
        if path.name == ".step-000004.ckpt.tmp":
            raise OSError(code, os.strerror(code), str(path))
        write_tensor_file(held, path)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.checkpoint, "write_tensor_file", failing)
        answer = train_here(*tiny, "run_dir=run", "steps=6", "checkpoint_every=2")
    lines = answer.stderr.splitlines()
    assert (answer.code, "Traceback" in answer.stderr) == (2, False), answer.stderr
    assert f"error: {os.strerror(code)}: run/checkpoints/.step-000004.ckpt.tmp" in lines
    assert lines[-1].startswith("The newest checkpoint is of step 2;")
    assert lines[-1].endswith("Continue with: python train.py resume=run")


def test_an_error_is_exit_code_1_and_a_report(tmp_path: Path, tiny: list[str], train_here: Train):
    answer = train_here(*tiny, "run_dir=run", "optimizer=adamw", "optimizer.lr=1e38", "gradient_clip=0", "steps=20")
    assert answer.code == 1
    assert "not finite at step" in answer.stderr
    assert json.loads((tmp_path / "run" / "report.json").read_text())["status"] == "failed"


def test_a_step_that_is_not_finite_is_named_and_never_saved(tmp_path: Path, tiny: list[str], train_here: Train):
    """A step is checked during the next one, or before a save, a validation or a log."""
    keys = ("optimizer=adamw", "optimizer.lr=1e30", "schedule.warmup_steps=0", "gradient_clip=0", "steps=20")
    for due in ("checkpoint", "validate", "log"):
        answer = train_here(*tiny, f"run_dir={due}", *keys, f"{due}_every=1")
        assert answer.code == 1
        assert "not finite at step 2," in answer.stderr
    assert {row["step"] for row in read_metrics(tmp_path / "log")} == {"1"}
    assert checkpoint_step(newest_good_checkpoint(tmp_path / "checkpoint")) == 1
    weights = load_file(tmp_path / "checkpoint" / "hf" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_finished_run_prints_its_loss_in_one_line(tiny: list[str], train_here: Train):
    answer = train_here(*tiny, "name=mine", "steps=2", "validate_every=1000")
    assert answer.code == 0, answer.stderr
    report = json.loads(Path("runs/pretrain/mine/report.json").read_text())
    assert report["val_loss"] > 0, "the last step is validated though 1000 does not divide 2"
    lines = answer.stdout.splitlines()
    assert lines.count(f"finished: val/loss {report['val_loss']:.4f}") == 1


def test_resume_auto_starts_and_then_continues(tiny: list[str], train_here: Train):
    command = [*tiny, "name=mine", "resume=auto"]
    assert train_here(*command, "steps=2").code == 0
    answer = train_here(*command, "steps=4")
    assert answer.code == 0, answer.stderr
    report = json.loads(Path("runs/pretrain/mine/report.json").read_text())
    assert (report["status"], report["steps"]) == ("finished", 4)
    assert train_here(*tiny, "name=mine", "steps=2").code == 2, "without resume the folder is taken"


def test_a_continued_run_keeps_to_its_new_intervals(tiny: list[str], train_here: Train):
    assert train_here(*tiny, "name=mine", "steps=2").code == 0
    answer = train_here("resume=runs/pretrain/mine", "steps=6", "checkpoint_every=1")
    assert answer.code == 0, answer.stderr
    assert Path("runs/pretrain/mine/checkpoints/step-000005.ckpt").is_file()


def test_a_shortened_run_still_ends_after_its_warm_up(tiny: list[str], train_here: Train):
    assert train_here(*tiny, "name=mine", "steps=6", "schedule.warmup_steps=4").code == 0
    answer = train_here("resume=runs/pretrain/mine", "steps=4")
    assert answer.code == 2
    assert "schedule.warmup_steps=4 is not less than steps=4" in answer.stderr


def test_resume_with_changed_data_is_refused(tiny: list[str], train_here: Train, sources: Path):
    shutil.copytree(sources, "text")
    assert train_here(*tiny, "path=text", "name=mine", "steps=2").code == 0
    Path("text", "more.py").write_text((sources / "heapq.py").read_text() * 2)
    answer = train_here("resume=runs/pretrain/mine", "steps=4")
    assert answer.code == 2
    assert "no longer those it was started with" in answer.stderr
    Path("text", "more.py").unlink()
    assert train_here("resume=runs/pretrain/mine", "steps=4").code == 0


def test_resume_with_other_micro_batches_computes_the_same(tiny: list[str], train_here: Train):
    keys = [*tiny, "steps=6", "checkpoint_every=3", "validate_every=2", "log_every=1", "micro_batch=8", "devices=1"]
    assert train_here(*keys, "name=unbroken").code == 0
    shutil.copytree("runs/pretrain/unbroken", "runs/pretrain/halved")
    Path("runs/pretrain/halved/checkpoints/step-000006.ckpt").unlink()
    answer = train_here("resume=runs/pretrain/halved", "micro_batch=2")
    assert answer.code == 0, answer.stderr
    unbroken, halved = (read_metrics(f"runs/pretrain/{name}") for name in ("unbroken", "halved"))
    for name in ("train/loss", "val/loss", "grad_norm"):
        assert dict(series(halved, name)) == pytest.approx(dict(series(unbroken, name)), rel=1e-4), name


def test_a_student_better_than_its_teacher_can_be_continued(tiny: list[str], train_here: Train):
    assert train_here(*tiny, "name=teacher", "model.n_embd=64", "steps=6").code == 0
    keys = [*tiny, "task=distill", "teacher=runs/pretrain/teacher", "name=student", "loss.hard_weight=1"]
    answer = train_here(*keys, "steps=30", "schedule=constant", "optimizer.lr=1e-2")
    assert answer.code == 0, answer.stderr
    before = json.loads(Path("runs/distill/student/report.json").read_text())
    assert before["val_loss"] < before["teacher"]["val_loss"]
    assert train_here("resume=runs/distill/student", "steps=32").code == 0
    after = json.loads(Path("runs/distill/student/report.json").read_text())
    assert after["steps"] == 32
    assert after["teacher"] == before["teacher"]


@pytest.mark.parametrize("ledger", [None, '{"checkpoints": [', ""])
def test_checkpoints_outlive_their_ledger(tiny: list[str], train_here: Train, ledger: str | None):
    keys = [*tiny, "name=mine", "steps=4", "checkpoint_every=2"]
    assert train_here(*keys).code == 0
    folder = Path("runs/pretrain/mine/checkpoints")
    Path(folder / "index.json").unlink()
    if ledger is not None:
        Path(folder / "index.json").write_text(ledger)
    answer = train_here(*keys, "resume=auto")
    assert answer.code == 0, answer.stderr
    assert "the checksums inside it" in answer.stderr
    assert len(read_metrics("runs/pretrain/mine")) > 0
    damaged = folder / "step-000004.ckpt"
    damaged.write_bytes(damaged.read_bytes()[:-500])
    (folder / "step-000002.ckpt").unlink(missing_ok=True)
    answer = train_here(*keys, "resume=auto")
    assert answer.code == 2
    assert "no whole checkpoint" in answer.stderr
    assert damaged.exists()


@pytest.mark.slow
def test_closed_stdout_does_not_end_the_run(cache: Path, tmp_path: Path, tiny: list[str]):
    """The reader of the lines, such as `head`, ends after the first one of a step."""
    keys = [key for key in tiny if not key.startswith("callbacks")]
    room = ["callbacks.samples.max_new_tokens=8", "callbacks.checkpoint.verify_export=false"]
    process = started(cache, tmp_path, *keys, *room, "steps=40", "log_every=2", "run_dir=run")
    assert process.stdout is not None
    assert any(line.startswith("step ") for line in process.stdout)
    process.stdout.close()
    assert process.wait() == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["status"] == "finished"
