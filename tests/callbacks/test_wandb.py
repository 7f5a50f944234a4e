"""W&B never ends or delays a run, and the offline runs of one run directory become one with all that was logged."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb

from callbacks.loggers.bounded_calls import BoundedCalls
from callbacks.loggers.metrics_csv import MetricsCsv
from callbacks.loggers.offline_runs import is_complete, offline_folders, wait_until_written
from callbacks.loggers.wandb import WeightsAndBiases
from callbacks.loggers.wandb_file import read_records, read_rows
from callbacks.loggers.wandb_resume import RowNumbers
from gpt2lab.reports.samples_jsonl import Sample, append_samples, drop_samples_after
from gpt2lab.storage.checkpoint_ledger import checkpoint_step, newest_good_checkpoint
from gpt2lab.storage.metrics_csv import drop_metrics_after, read_metrics, series
from tests.conftest import ROOT, started
from tests.support.offline_wandb import assert_one_complete_run, files_in, runs_in
from tests.support.wandb_server import Server


@pytest.fixture(autouse=True)
def warnings_reach_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher, which other tests run in this process, does not propagate log lines to the root logger."""
    monkeypatch.setattr(logging.getLogger("callbacks"), "propagate", True)
    monkeypatch.setenv("WANDB_MODE", "offline")


def fail() -> None:
    raise OSError(28, "No space left on device")


def end() -> None:
    raise SystemExit(1)


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (fail, "[Errno 28] No space left on device"),
        (end, "1"),
        (threading.Event().wait, "no response within 0.1 seconds"),
    ],
)
def test_a_wandb_call_ends_in_time_with_one_warning(
    action: Callable[[], Any], reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("callbacks.loggers.bounded_calls.KILLED_SECONDS", 0.1)
    monkeypatch.setattr("callbacks.loggers.bounded_calls.end_service", lambda: None)  # that of other tests
    calls = BoundedCalls()
    assert calls.call(action, "otherwise", seconds=0.1) == "otherwise"
    assert calls.call(lambda: "not called", "otherwise") == "otherwise"
    assert [record.getMessage() for record in caplog.records] == [f"W&B is off for the rest of this run: {reason}"]
    assert not any(record.exc_info for record in caplog.records)


def use_as_other_callbacks_do(logger: WeightsAndBiases) -> None:
    model = torch.nn.Linear(2, 2)
    logger.watch(model, log="all", log_freq=1)
    model(torch.ones(1, 2)).sum().backward()
    logger.log_hyperparams({"seed": 1})
    logger.log_metrics({"train/loss": 2.0, "epoch": 0}, step=1)
    logger.experiment.log({"mine": 1.0})
    wandb.log({"mine too": 1.0})
    logger.log_table("table", columns=["a"], data=[["b"]], step=2)
    logger.log_image("image", [np.zeros((4, 4, 3), np.uint8)], step=2)
    logger.experiment.config.update({"added": 1})
    logger.experiment.summary["best"] = 3
    logger.experiment.log_artifact(wandb.Artifact("a", type="b"))
    logger.experiment.define_metric("mine")
    logger.finalize("success")
    logger.experiment.log({"late": 1})


def file_instead_of_folder(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir / "wandb").write_text("")


def invalid_settings(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_unused: Any) -> None:
        raise ValueError("WANDB_BASE_URL is no URL")

    monkeypatch.setattr(wandb, "init", init)


@pytest.mark.parametrize(
    ("mode", "before", "warning"),
    [
        ("offline", None, ""),
        ("disabled", None, ""),
        ("nonsense", None, "WANDB_MODE=nonsense is none of online, run, offline, dryrun, shared, disabled"),
        ("offline", file_instead_of_folder, "File exists"),
        ("offline", invalid_settings, "WANDB_BASE_URL is no URL"),
    ],
)
def test_calls_of_other_callbacks_work_whatever_wandb_does(
    mode: str,
    before: Callable[[Path, pytest.MonkeyPatch], None] | None,
    warning: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("WANDB_MODE", mode)
    if before:
        before(tmp_path, monkeypatch)
    use_as_other_callbacks_do(WeightsAndBiases(str(tmp_path)))
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("callbacks")]
    assert [text for text in warnings if "W&B is off" in text] == [
        text for text in warnings if warning and warning in text
    ]
    assert bool(warning) == any("W&B is off" in text for text in warnings)
    files = files_in(tmp_path)
    assert len(files) == (1 if mode == "offline" and not before else 0)
    for file in files:
        logged = {name: row["step"] for row in read_rows(file) for name in row}
        assert {"train/loss": 1, "mine": 1, "mine too": 1, "table": 2, "image": 2}.items() <= logged.items()


def log_session(
    run_dir: Path,
    first: int,
    last: int,
    is_killed: bool = True,
    without_wandb: int = 0,
    run: Callable[[Any], None] = lambda run: None,
) -> None:
    """Log steps `first` to `last` like a run that was resumed from the step before; what W&B has of a killed run ends
    with a whole row.

    Args:
        without_wandb: last steps that W&B misses.
        run: called with the W&B run at the first step.
    """
    drop_metrics_after(run_dir, first - 1)
    drop_samples_after(run_dir, first - 1)
    logger, rows = WeightsAndBiases(str(run_dir)), MetricsCsv(str(run_dir))
    logger.log_hyperparams({"seed": 1, "model": {"n_layer": 2}})
    for step in range(first, last + 1):
        loggers = [rows, *([logger] if step <= last - without_wandb else [])]
        for one in loggers:
            one.log_metrics({"train/loss": 5 / step, "tokens": 10.0 * step}, step)
        if step % 2 == 0:
            samples = [Sample(step, "def f(", f"x{step}", "greedy"), Sample(step, "def f(", "y", "top_k")]
            append_samples(run_dir, samples)
            for one in loggers:
                one.log_metrics({"val/loss": 6 / step}, step)
            if logger in loggers:
                logger.log_samples(samples, step)
        if step == first:
            run(logger.experiment)
        if logger in loggers:
            logger.experiment.log({"mine": step})
    if is_killed:
        logger._log_row()
        folder = Path(logger.experiment.dir).parent
        logger._experiment.finish()
        wait_until_written(folder)
    else:
        logger.finalize("success")


SESSIONS: dict[str, list[dict[str, Any]]] = {
    "once": [{"first": 1, "last": 5}],
    "killed twice": [{"first": 1, "last": 5}, {"first": 4, "last": 8}, {"first": 7, "last": 9}],
    "killed before the first row": [{"first": 1, "last": 0}, {"first": 1, "last": 0}, {"first": 1, "last": 4}],
    "rows missing": [{"first": 1, "last": 6, "without_wandb": 3}],
}


@pytest.mark.parametrize("sessions", SESSIONS.values(), ids=SESSIONS)
def test_offline_runs_become_one_with_the_rows_of_metrics_csv(sessions: list[dict[str, Any]], tmp_path: Path):
    for session in sessions[:-1]:
        log_session(tmp_path, **session)
    assert len(files_in(tmp_path)) == len(sessions) - 1
    log_session(tmp_path, **sessions[-1], is_killed=False)
    (file,) = files_in(tmp_path)
    last = sessions[-1]["last"]
    mine = [row["mine"] for row in read_rows(file) if "mine" in row]
    if len(sessions) > 1 or "without_wandb" in sessions[0]:
        assert_one_complete_run(tmp_path)
    if "without_wandb" not in sessions[0]:
        assert mine == list(range(1, last + 1)), "what other callbacks logged"
    before = file.stat().st_mtime_ns
    logger = WeightsAndBiases(str(tmp_path))
    assert not logger.merge_offline_runs({})
    assert files_in(tmp_path) == [file]
    assert file.stat().st_mtime_ns == before
    assert {run.run_id for run in runs_in(tmp_path)} == {logger.run_id()}


def test_merged_run_keeps_what_other_callbacks_logged(tmp_path: Path):
    note, run_dir = tmp_path / "note.txt", tmp_path / "run"
    note.write_text("written by another callback")
    for first, last in ((1, 3), (3, 4)):
        log_session(run_dir, first, last, run=lambda run: log_as_others_do(run, note))
    assert WeightsAndBiases(str(run_dir)).merge_offline_runs({})
    (file,) = files_in(run_dir)
    rows = [(row["step"], row["loss of a batch"]) for row in read_rows(file) if "loss of a batch" in row]
    assert rows == [(1, 0.5), (1, 0.25), (3, 0.5), (3, 0.25)]
    artifacts = [record.artifact for record in read_records(file) if record.HasField("artifact")]
    (kept,) = [artifact for artifact in artifacts if artifact.name == "notes"]
    assert (kept.type, sorted(kept.aliases), kept.metadata) == ("text", ["best", "latest"], '{"k":1}')
    assert [content.path for content in kept.manifest.contents] == ["a/note.txt"]
    assert Path(kept.manifest.contents[0].local_path).read_text() == note.read_text()


def log_as_others_do(run: Any, note: Path) -> None:
    for value in (0.5, 0.25):
        run.log({"loss of a batch": value})
    artifact = wandb.Artifact("notes", type="text", metadata={"k": 1})
    artifact.add_file(str(note), name="a/note.txt")
    run.log_artifact(artifact, aliases=["best"])


def test_offline_runs_without_metrics_csv_are_left_as_they_are(tmp_path: Path):
    log_session(tmp_path, 1, 3)
    log_session(tmp_path, 2, 4)
    (tmp_path / "metrics.csv").unlink()
    before = files_in(tmp_path)
    assert not WeightsAndBiases(str(tmp_path)).merge_offline_runs({})
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    "interrupted",
    ["callbacks.loggers.offline_runs.copy_media", "pathlib.Path.rename", "callbacks.loggers.offline_runs._delete"],
)
def test_an_interrupted_merge_loses_nothing_and_is_repeated(
    interrupted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    log_session(tmp_path, 1, 4)
    log_session(tmp_path, 3, 6)
    before = {file: file.read_bytes() for file in files_in(tmp_path)}
    logger = WeightsAndBiases(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(interrupted, interrupt)
        with pytest.raises(KeyboardInterrupt):
            logger.merge_offline_runs({})
    assert {file: file.read_bytes() for file in before} == before
    assert not is_complete(tmp_path)
    assert logger.merge_offline_runs({})
    assert len(offline_folders(tmp_path)) == 1
    assert_one_complete_run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("behaviour", "words", "message"),
    [
        ("answers", [], "W&B: http://127.0.0.1"),
        ("silent", [], "this run is logged offline."),
        ("stops", [], "W&B has not received the whole run in time; `wandb sync"),
        ("answers", ["stop"], "W&B is off for the rest of this run: no response within"),
        ("", ["stop"], "W&B is off for the rest of this run: no response within"),
        ("hangs", ["resume"], "W&B did not rewind this run, so repeated steps are omitted: "),
    ],
)
def test_no_server_and_no_service_keeps_a_process_running(
    behaviour: str, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    if words == ["resume"]:
        ended = resumed_process(behaviour, tmp_path)
    else:
        with Server(behaviour) as server:
            ended = wandb_process(server.login if behaviour else {}, tmp_path, *words)
    assert ended.returncode == 0, ended.stderr
    assert "finished" in ended.stdout
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(list((tmp_path / "wandb").glob("*run-*-*"))) == (2 if words == ["resume"] else 1), "one for each process"


def wandb_process(login: dict[str, str], run_dir: Path, *words: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(ROOT / "tests" / "support" / "wandb_run.py"), str(run_dir), "5", *words]
    return subprocess.run(program, env={**os.environ, **login}, capture_output=True, text=True, timeout=180)


def resumed_process(behaviour: str, run_dir: Path) -> subprocess.CompletedProcess[str]:
    """Resume a run after its first step, of which the server has three."""
    (run_dir / "wandb" / "run-20260101_000000-abc").mkdir(parents=True)
    (run_dir / "wandb" / "run-id").write_text("abc")
    (run_dir / "wandb" / "row-numbers.csv").write_text("1,0\n2,1\n3,2\n")
    with Server(behaviour) as server:
        server.history = [{"step": 1, "_step": 0}, {"step": 2, "_step": 1}, {"step": 3, "_step": 2}]
        return wandb_process(server.login, run_dir, "resume")


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", ["rewinds", "answers"])
def test_a_resumed_process_adds_one_wandb_folder(behaviour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    ended = resumed_process(behaviour, tmp_path)
    assert ended.returncode == 0, ended.stderr
    earlier, added = sorted(path.name for path in (tmp_path / "wandb").glob("run-*-*"))
    assert (earlier, added) == ("run-20260101_000000-abc", (tmp_path / "wandb" / "latest-run").readlink().name)


@pytest.mark.parametrize(
    ("text", "completed", "last"),
    [
        ("1,0\n2,1\n3,4\n", 2, 3),  # another callback logged rows 2 and 3
        ("1,0\n2,1\n3,4\n", 3, None),  # nothing is repeated
        ("1,0\n3,4\n", 0, None),  # no row is left
        ("1,0\n2,12\n3,1", 1, 11),  # a crash truncated the last line
        ("", 2, None),
    ],
)
def test_rewind_goes_to_the_last_row_of_the_checkpoint(text: str, completed: int, last: int | None, tmp_path: Path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "row-numbers.csv").write_text(text)
    numbers = RowNumbers(tmp_path)
    assert numbers.last_until(completed) == last
    if last is not None:
        numbers.begin(last + 1)
        assert numbers.newest == completed
        numbers.add(completed + 1, last + 1)
        assert numbers.last_until(completed) == last


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", ["rewinds", "answers"])
def test_an_online_run_that_is_resumed_has_each_step_once(behaviour: str, cache: Path, tiny: list[str], tmp_path: Path):
    run_dir = tmp_path / "run"
    keys = [key for key in tiny if not key.startswith("logger")]
    keys += ["logger=wandb", "log_every=1", "validate_every=5", "checkpoint_every=5", "steps=9999", "run_dir=run"]
    keys += ["compile=false", "threads=1", "schedule=constant", "optimizer.lr=3"]  # it diverges
    with Server(behaviour) as server:
        process = started(cache, tmp_path, *keys, **server.login)
        completed = kill_after_later_rows(process, server, run_dir)
        sent, before = server.history[-1]["step"], len(server.received)
        ended = started(cache, tmp_path, "resume=run", f"steps={sent + 7}", **server.login)
        _, errors = ended.communicate()
    assert ended.returncode == 0, errors
    assert "Traceback" not in errors
    rows = read_metrics(run_dir)
    assert [row["step"] for row in server.history] == [int(row["step"]) for row in rows]
    assert [row["_step"] for row in server.history] == list(range(len(rows)))
    losses = [loss for _, loss in series(rows, "val/loss")]
    assert min(losses) == losses[0], "the best value is of the killed process"
    assert server.summary["val/loss"] == pytest.approx({"min": min(losses), "last": losses[-1]}, rel=1e-6)
    first_sent_again = server.received[before]["step"]
    notices = errors.count("repeated steps are omitted")
    if behaviour == "rewinds":
        for row, wanted in zip(server.history, rows, strict=True):
            expected = {name: float(text) for name, text in wanted.items() if text}
            assert {name: row.get(name) for name in expected} == pytest.approx(expected, rel=1e-6)
        assert (server.rewinds, first_sent_again, notices) == ([completed - 1], completed + 1, 0)
    else:
        assert (first_sent_again, notices) == (sent + 1, 1)


@pytest.mark.slow
def test_a_run_killed_twice_and_resumed_is_one_offline_run(cache: Path, tiny: list[str], tmp_path: Path):
    keys = [key for key in tiny if not key.startswith("logger")]
    keys += ["logger=wandb", "log_every=1", "validate_every=5", "checkpoint_every=5", "callbacks=default", "steps=400"]
    keys += ["callbacks.samples.max_new_tokens=2", "sample_every=10", "compile=false", "threads=1", "run_dir=run"]
    for command in (keys, ["resume=run"]):
        process = started(cache, tmp_path, *command)
        before = len(read_metrics(tmp_path / "run"))
        while len(read_metrics(tmp_path / "run")) < before + 12:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.kill()
        process.communicate()
    step = int(read_metrics(tmp_path / "run")[-1]["step"])
    ended = started(cache, tmp_path, "resume=run", f"steps={step + 7}")
    _, errors = ended.communicate()
    assert ended.returncode == 0, errors
    assert_one_complete_run(tmp_path / "run")
    command = [sys.executable, "-m", "wandb", "sync", str(files_in(tmp_path / "run")[0].parent)]
    with Server("answers") as server:
        given = {**os.environ, **server.login}
        synced = subprocess.run(command, env=given, capture_output=True, text=True, timeout=180)
    assert "Finished syncing" in synced.stderr, synced.stderr
    assert "file_stream" in server.queries


def kill_after_later_rows(process: subprocess.Popen[str], server: Server, run_dir: Path) -> int:
    """Kill a run when the server has rows of later steps than the newest checkpoint, whose step is returned."""
    while process.poll() is None:
        time.sleep(0.05)
        process.send_signal(signal.SIGSTOP)
        newest = newest_good_checkpoint(run_dir)
        if newest is not None and server.history and server.history[-1]["step"] > checkpoint_step(newest):
            process.kill()
            process.communicate()
            return checkpoint_step(newest)
        process.send_signal(signal.SIGCONT)
    raise AssertionError(process.communicate())


def interrupt(*_unused: Any) -> Any:
    raise KeyboardInterrupt
