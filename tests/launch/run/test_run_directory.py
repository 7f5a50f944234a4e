"""The directory of a run: which process may create, use and delete it, and recovery from a killed start."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import lightning
import pytest

from gpt2lab.errors import InputError
from gpt2lab.storage import folder_lock
from gpt2lab.storage.checkpoint_ledger import commit_checkpoint, read_entries, scratch_file
from gpt2lab.storage.folder_lock import FolderLock
from gpt2lab.storage.metrics_csv import MetricsFile, read_metrics
from gpt2lab.storage.report_json import read_report
from launch import rank_environment
from launch.config import run_spec
from launch.config.run_dir import RunDirectory, finished_runs, kept_checkpoint_message
from launch.config.run_spec import PreparedSpec
from launch.run import resume
from tests.conftest import ROOT, Train, environment, started
from tests.launch.run.test_resume import assert_same_end
from tests.support.killed_start import die_at, in_fork

# Environment variables

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "host", "MASTER_PORT": "1"}
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
SRUN |= {"SLURM_JOB_ID": "5", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "gpu1"}
OURS = {rank_environment.OUTCOME_FILE: "/x", "RANK": "0", "WORLD_SIZE": "2"}
BARE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
WHO = {
    "nothing": ({}, "alone", True),
    "Kubeflow": ({**BARE, "MASTER_ADDR": "host", "MASTER_PORT": "1"}, "alone", True),
    "a forgotten export": ({"RANK": "3"}, "alone", True),
    "one task of SLURM": ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "alone", True),
    "SLURM without a node": ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "5"}, "alone", True),
    "SLURM without a number": ({"SLURM_STEP_NUM_TASKS": ""}, "alone", True),
    "part of torchrun's": ({"TORCHELASTIC_RUN_ID": "x", "RANK": "1"}, "alone", True),
    "torchrun": (TORCHRUN, "cluster", False),
    "srun": (SRUN, "cluster", False),
    "srun and a forgotten export": ({**SRUN, **BARE}, "cluster", False),
    "torchrun under srun": ({**SRUN, **TORCHRUN, "RANK": "0"}, "cluster", True),
    "torchrun with a word for a rank": ({**TORCHRUN, "RANK": "x"}, "alone", True),
    "torchrun with a word for a port": ({**TORCHRUN, "MASTER_PORT": "abc"}, "alone", True),
    "torchrun without ranks here": ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, "alone", True),
    "a rank beyond the number of ranks": ({**TORCHRUN, "RANK": "2"}, "alone", True),
    "a task beyond the number of tasks": ({**SRUN, "SLURM_PROCID": "5"}, "alone", True),
    "SLURM with a word for a job": ({**SRUN, "SLURM_JOB_ID": "b"}, "alone", True),
    "this launcher": ({**OURS, "RANK": "1"}, "ours", False),
    "this launcher under srun": ({**SRUN, **OURS, "RANK": "0"}, "ours", True),
    "a variable of this launcher alone": ({rank_environment.OUTCOME_FILE: "/x"}, "alone", True),
    "an empty variable of this launcher": ({**OURS, rank_environment.OUTCOME_FILE: ""}, "alone", True),
}


@pytest.mark.parametrize("name", WHO)
def test_only_started_ranks_are_ranks(name: str, capfd: pytest.CaptureFixture[str]):
    variables, who, is_first = WHO[name]
    left = dict(variables)
    rank_environment.ignore_foreign_variables(left)
    assert rank_environment.is_spawned_rank(left) == (who == "ours")
    assert rank_environment.is_cluster_rank(left) == (who == "cluster")
    assert rank_environment.is_main_process(left) == is_first
    foreign = (
        *rank_environment.RANK_VARIABLES,
        *(["SLURM_PROCID"] if variables.get("SLURM_PROCID", "0") != "0" else []),
    )
    ignored = [name for name in foreign if name in variables] if who == "alone" else []
    assert not set(ignored) & left.keys()
    assert left.keys() == variables.keys() - set(ignored)
    notice = capfd.readouterr().err
    assert notice.count("\n") == bool(ignored)
    assert all(f"{name}={variables[name]}" in notice for name in ignored)


FAILS = f"+callbacks.end._target_={__name__}.EndsBeforeTheFirstStep"


class EndsBeforeTheFirstStep(lightning.Callback):
    """Raises a user error when training begins."""

    def on_train_start(self, *_: object) -> None:
        raise InputError("the data are gone")


@pytest.mark.parametrize("variables", [BARE, {"RANK": "1", "WORLD_SIZE": "2"}], ids=str)
def test_foreign_rank_variables_neither_move_nor_delete(
    variables: dict[str, str], tiny: list[str], train_here: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    Path("precious").write_text("work")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused = train_here(*tiny, "steps=2", FAILS)
    assert (refused.code, refused.stderr.count("Ignoring")) == (2, 1), refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["precious"]

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert train_here(*tiny, "steps=2", "run_dir=run").code == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["precious", "run"]
    assert len(read_entries("run")) == 1


# Deletion

UNVERIFIED = "callbacks.checkpoint.verify_export=false"


class LeavesAFile(EndsBeforeTheFirstStep):
    """Writes an extra file into the run directory."""

    def on_train_start(self, *_: object) -> None:
        Path("deep/run/notes.txt").write_text("mine")
        super().on_train_start()


@pytest.mark.parametrize(
    ("before", "foreign", "after"),
    [
        ([], False, []),
        (["deep", "deep/run"], False, ["deep", "deep/run"]),
        ([], True, ["deep", "deep/run", "deep/run/notes.txt"]),
    ],
    ids=["nothing", "the empty folder itself", "a foreign file inside"],
)
def test_a_run_without_a_step_deletes_only_its_own(
    before: list[str], foreign: bool, after: list[str], tiny: list[str], train_here: Train, tmp_path: Path
):
    for folder in before:
        Path(folder).mkdir()
    failing = FAILS.replace("EndsBeforeTheFirstStep", "LeavesAFile") if foreign else FAILS
    assert train_here(*tiny, "steps=2", "run_dir=deep/run", failing).code == 2
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("deep/**/*")} | (
        {"deep"} if Path("deep").exists() else set()
    )
    assert left >= set(after)
    assert left == set(after) or foreign


def other(path: str, content: str = "{}") -> Callable[[], None]:
    """Write a file there, after making its folder."""

    def make() -> None:
        Path(path).parent.mkdir(parents=True)
        Path(path).write_text(content)

    return make


def link_to_a_file() -> None:
    Path("victim").write_text("precious")
    other("run/.config.yaml.7.tmp")()
    Path("run/.lock").symlink_to("../victim")


IN_THE_WAY: dict[str, tuple[Callable[[], object], str]] = {
    "the lock of a killed run, emptied": (other("run/.lock"), ""),
    "the scratch file of a killed start": (other("run/.config.yaml.7.tmp"), ""),
    "a link to an empty folder": (lambda: (Path("run").symlink_to("target"), Path("target").mkdir()), ""),
    "a link to nothing": (lambda: Path("run").symlink_to("deep/target"), ""),
    "a hidden file": (other("run/.config.yaml.orig"), "run is not empty"),
    "a folder called .lock": (lambda: Path("run/.lock").mkdir(parents=True), ".lock cannot be opened"),
    "a link called .lock": (link_to_a_file, ".lock cannot be opened"),
    "files where the start is filled": (other(".run.start/notes.txt"), "contains other files"),
    "a loop of links": (lambda: Path("run").symlink_to("run"), "Symlink loop"),
    "a long name": (lambda: None, "is too long"),
}


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_named_run_is_written_to_its_name(name: str, tiny: list[str], train_here: Train, tmp_path: Path):
    """A run reuses the files of a killed start and never another name; no foreign file is moved or changed."""
    put, refusal = IN_THE_WAY[name]
    put()
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    answer = train_here(*tiny, "steps=2", f"run_dir={'r' * 300 if name == 'a long name' else 'run'}", UNVERIFIED)
    assert answer.code == (2 if refusal else 0), answer.stderr
    assert refusal in answer.stderr
    assert "Traceback" not in answer.stderr
    if refusal:
        assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    else:
        assert len(read_entries("run")) == 1
        assert not [path.name for path in tmp_path.glob("*run?*")]
    assert not Path("victim").exists() or Path("victim").read_text() == "precious"


def test_scratch_files_of_a_killed_write_are_deleted(tiny: list[str], train_here: Train):
    train_here(*tiny, "steps=2", "run_dir=run", UNVERIFIED)
    names = ("hf/.README.md.7.tmp", "checkpoints/.index.json.7.tmp", ".report.json.7.tmp")
    left = [Path("run", name) for name in names]
    others = [Path("run", name) for name in ("hf/notes.7.tmp", "hf/.notes.tmp", ".notes.7.tmp")]
    for path in (*left, *others):
        path.write_text("half")
    answer = train_here("resume=run")
    assert answer.code == 0, answer.stderr
    assert not [path for path in left if path.exists()]
    assert all(path.read_text() == "half" for path in others)


# Two processes, one directory

HOLD = """
import os, sys, time
from gpt2lab.storage.folder_lock import FolderLock
from pathlib import Path
lock = FolderLock(Path(sys.argv[1]))
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(600)
"""


@contextmanager
def held(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Return a process that holds the lock on a folder, and the process id of its child."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(folder)
    )
    assert process.stdout
    child = int(process.stdout.readline())
    try:
        yield process, child
    finally:
        process.kill()
        process.wait()
        os.kill(child, signal.SIGKILL)


def test_a_lock_ends_with_its_owner_not_with_children(tmp_path: Path):
    with held(tmp_path) as (owner, child):
        with pytest.raises(InputError) as refused:
            FolderLock(tmp_path)
        assert f"process {owner.pid} on {socket.gethostname()}" in str(refused.value)
        owner.kill()
        owner.wait()
        os.kill(child, 0)  # which is alive
        FolderLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_a_lock_is_released_in_a_folder_made_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The lock file cannot be removed; an error of that would hide the one that ends the run."""

    def fail(*_: object, **_options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    lock = FolderLock(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        lock.release()
    assert not folder_lock.is_locked(tmp_path)
    FolderLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_file_system_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The system call is patched to fail like NFS without lockd, as local file systems have locks."""

    def fail(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(folder_lock.fcntl, "lockf", fail)
    monkeypatch.setattr(folder_lock.log, "propagate", True)
    FolderLock(tmp_path).release()
    assert "cannot lock (No locks available)" in caplog.text


@pytest.mark.parametrize("state", ["a start", "a checkpoint"])
def test_a_second_process_is_refused_and_changes_nothing(
    state: str, tiny: list[str], train_here: Train, tmp_path: Path
):
    assert train_here(*tiny, "steps=2", "run_dir=run").code == 0
    if state == "a start":
        for file in (tmp_path / "run" / "checkpoints").iterdir():
            file.unlink()
    before = contents(tmp_path / "run")
    with held(tmp_path / "run") as (owner, _):
        for resumed in (["resume=run"], [*tiny, "run_dir=run", "resume=auto"]):
            refused = train_here(*resumed)
            assert refused.code == 2
            assert f"process {owner.pid} on {socket.gethostname()}" in refused.stderr
        assert {p: p.read_bytes() for p in before} == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_links_to_another_runs_files_are_refused(tiny: list[str], train_here: Train, tmp_path: Path):
    assert train_here(*tiny, "steps=2", "checkpoint_every=1", "run_dir=first").code == 0
    (tmp_path / "first" / "inspect").mkdir()
    for name in ("checkpoints", "hf", "metrics.csv", "config.yaml", "inspect"):
        second = tmp_path / f"second-{name}"
        shutil.copytree(tmp_path / "first", second, symlinks=True)
        shutil.rmtree(second / name) if (second / name).is_dir() else (second / name).unlink()
        (second / name).symlink_to(tmp_path / "first" / name)
        before = contents(tmp_path / "first")
        answer = train_here(f"resume={second.name}", "steps=3")
        assert answer.code == 2, name
        assert f"{second.name}/{name} is a link to {tmp_path}/first/{name}" in answer.stderr
        assert contents(tmp_path / "first") == before


LOST: dict[str, Callable[[Path], object]] = {
    "a folder that was deleted": lambda checkpoints: None,
    "a link to a disk that is not mounted": lambda checkpoints: checkpoints.symlink_to("/nowhere/at/all"),
    "files that were deleted": lambda checkpoints: (
        checkpoints.mkdir(),
        (checkpoints / "index.json").write_text(LEDGER),
    ),
}
LEDGER = '{"checkpoints": [{"file": "step-000002.ckpt", "step": 2, "bytes": 7, "sha256": "x"}]}'


@pytest.mark.parametrize("how", LOST)
def test_run_without_its_checkpoints_does_not_start_anew(how: str, tiny: list[str], train_here: Train, tmp_path: Path):
    assert train_here(*tiny, "steps=2", "run_dir=run").code == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    LOST[how](tmp_path / "run" / "checkpoints")
    report = tmp_path / "run" / "report.json"
    report.write_text(report.read_text().replace('"finished"', '"stopped"'))
    before = contents(tmp_path / "run" / "hf")
    for resumed in (["resume=run", "steps=4"], [*tiny, "run_dir=run", "resume=auto"]):
        answer = train_here(*resumed)
        assert answer.code == 2, answer.stderr
        assert "does not exist" in answer.stderr or "Put its checkpoints back" in answer.stderr
        assert contents(tmp_path / "run" / "hf") == before
        assert [row["step"] for row in read_metrics(tmp_path / "run")] == ["2"]


def test_links_within_a_run_or_to_its_whole_directory_work(tiny: list[str], train_here: Train, tmp_path: Path):
    assert train_here(*tiny, "steps=2", "run_dir=first").code == 0
    (tmp_path / "first" / "checkpoints").rename(tmp_path / "first" / "kept")
    (tmp_path / "first" / "checkpoints").symlink_to("kept")
    (tmp_path / "second").symlink_to("first")
    answer = train_here("resume=second", "steps=3")
    assert answer.code == 0, answer.stderr
    assert read_entries(tmp_path / "first")[-1].step == 3


def test_lost_steps_are_those_after_the_checkpoint(tmp_path: Path):
    metrics = MetricsFile(tmp_path)
    metrics.write(4, {"train/loss": 3.0})
    (tmp_path / "checkpoints").mkdir()
    scratch_file(tmp_path, 4).write_bytes(b"checkpoint")
    commit_checkpoint(tmp_path, 4, 2)
    assert "of step 4; steps after it are lost" in kept_checkpoint_message(tmp_path, planned=6)
    assert "of step 4; no step is lost" in kept_checkpoint_message(tmp_path, planned=4)
    assert "of step 4; no step is lost" in kept_checkpoint_message(tmp_path, planned=6, reached=4)
    metrics.write(5, {"train/loss": 3.0})
    assert "of step 4; steps 5 to 5 or later are lost" in kept_checkpoint_message(tmp_path, planned=6)


def test_a_damaged_report_is_no_finished_run(tmp_path: Path):
    for name, make in (("nested", lambda file: file.write_text("[" * 100_000)), ("folder", lambda file: file.mkdir())):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "report.json")
    assert finished_runs(tmp_path) == []


def test_a_second_sweep_or_study_in_a_folder_is_refused(tiny: list[str], train_here: Train, tmp_path: Path):
    folder = tmp_path / "swept"
    folder.mkdir()
    with held(folder) as (owner, _):
        train_here("-m", *tiny, "seed=1,2", f"hydra.sweep.dir={folder}")
        assert sorted(path.name for path in folder.iterdir()) == [".lock"]
        (folder / "multirun.yaml").write_text("of the first sweep")
        refused = train_here("-m", *tiny, "seed=1,2", f"hydra.sweep.dir={folder}")
    assert refused.code == 2
    assert f"process {owner.pid} on {socket.gethostname()} holds it" in refused.stderr
    assert (folder / "multirun.yaml").read_text() == "of the first sweep"


# A start that was killed


def test_every_prefix_of_creating_a_directory_is_continued(tmp_path: Path, tiny: list[str], train_here: Train):
    """A fork of this process is killed before each of its file operations in turn."""
    assert train_here(*tiny, "steps=2", "run_dir=done").code == 0

    done = run_spec.load(Path("done/config.yaml"))

    def run(number: int, **keys: str) -> PreparedSpec:
        return replace(done, config=replace(done.config, run_dir=f"{number}/run", name=None, resume=keys.get("resume")))

    def create(number: int) -> int:
        die_at(number, (tmp_path / str(number)).absolute())
        RunDirectory().enter(run(number))
        return 0

    code, number = -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        number += 1
        Path(str(number)).mkdir()
        code = in_fork(lambda number=number: create(number), tmp_path / "output.txt")
        folder = resume.existing_folder(run(number, resume="auto").config)
        assert (folder is not None) == Path(f"{number}/run").exists(), "a directory is there with its configuration"
        directory = RunDirectory()
        if folder is not None:
            directory.open(folder)
            assert resume.existing_run(run(number, resume="auto").config, folder) is None
            run_spec.load(folder / "config.yaml")
        directory.enter(run(number))
        assert sorted(path.name for path in Path(f"{number}/run").iterdir()) == [".hydra", ".lock", "config.yaml"]
        directory.close()
        assert sorted(path.name for path in Path(str(number)).iterdir()) == ["run"]
    assert code == 0, (tmp_path / "output.txt").read_text()
    assert number > 5, "a mkdir, a lock, and a file written aside, renamed, with its folder"


def test_restart_uses_the_present_data(tiny: list[str], train_here: Train, tmp_path: Path):
    """Without a checkpoint there is no data order to preserve."""
    text = tmp_path / "text.py"
    text.write_text(Path(lightning.__file__).read_text() * 9)
    keys = [*(key for key in tiny if not key.startswith("path=")), "path=text.py", "steps=2", UNVERIFIED]
    assert train_here(*keys, "run_dir=run").code == 0
    text.write_text(text.read_text() + "# one line more\n" * 9)
    refused = train_here("resume=run", "steps=3")
    assert (refused.code, "The data of run" in refused.stderr) == (2, True), refused.stderr
    for folder in ("checkpoints", "hf"):  # as before the first save
        shutil.rmtree(f"run/{folder}")
    Path("run/report.json").unlink()
    shutil.rmtree("run/.hydra")
    for file in ("run/.hydra", "run/checkpoints"):
        Path(file).write_text("no folder")
    answer = train_here("resume=run")
    assert answer.code == 0, answer.stderr
    assert "run has no checkpoint: the run begins again at step 0." in answer.stdout + answer.stderr
    assert run_spec.load(Path("run/config.yaml")).prepared.data_hash == read_report("run")["data"]["hash"]


SMALL = ("steps=12", "checkpoint_every=4", "validate_every=4", "log_every=2", "model.dropout=0.1", "compile=false")


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_killed_at_each_file_operation_a_start_is_continued(tmp_path: Path, tiny: list[str], cache: Path):
    """resume=auto and resume=DIR both end with the bytes of a run that was never killed."""
    keys = [*tiny, "steps=4", "threads=1", "compile=false", "callbacks=default", UNVERIFIED]
    command = [sys.executable, str(ROOT / "tests" / "support" / "killed_start.py"), str(tmp_path), "1", "500", *keys]
    ended = subprocess.run(command, env=environment(cache), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = [json.loads(line) for line in ended.stdout.splitlines()]
    assert rows[-1]["killed"] is False, "the whole run is covered"
    assert len(rows) > 30
    whole = tmp_path / str(rows[-1]["n"]) / "run"
    for row in rows:
        assert row["auto"] == 0, row
        assert row["resume"] == (0 if row["left"] else None), row
        for name in ("run", "copy") if row["left"] else ("run",):
            assert_same_end(tmp_path / str(row["n"]) / name, whole)


@pytest.mark.chaos
def test_only_one_of_two_owners_trains(tmp_path: Path, tiny: list[str], cache: Path):
    """The second is started at once, after the first checkpoint, and after the first owner was killed."""
    keys = [*tiny, *SMALL, "run_dir=run", "resume=auto"]
    for moment in ("at once", "after a checkpoint"):
        first = started(cache, tmp_path, *keys, "steps=100000")
        while not (read_entries(tmp_path / "run") if moment != "at once" else (tmp_path / "run" / ".lock").exists()):
            assert first.poll() is None, first.communicate()
            time.sleep(0.01)
        second = started(cache, tmp_path, *keys, "steps=100000")
        _, stderr = second.communicate()
        assert second.returncode == 2, stderr
        assert f"process {first.pid} on {socket.gethostname()}" in stderr
        assert first.poll() is None
        first.kill()
        first.communicate()
    step = read_entries(tmp_path / "run")[-1].step
    last = started(cache, tmp_path, "resume=run", f"steps={step + 2}")
    assert last.communicate()[1].count("Traceback") == 0
    assert last.returncode == 0
    assert int(read_metrics(tmp_path / "run")[-1]["step"]) == step + 2
