"""A sweep that cannot start more jobs (damaged study, lost folder) ends after its running ones."""

import shlex
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2lab.storage.report_json import read_report
from tests.conftest import Train, needs_two_cores
from tests.launch.sweep.test_search import study
from tests.launch.sweep.test_sweep import rows
from tests.launch.sweep.test_sweep_on_ranks import marked

PLANTED = """
import shutil
import time
from pathlib import Path

import lightning


class Saboteur(lightning.Callback):
    # The first job does its damage while the second trains, which ends two seconds after the sweep has noticed.

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        own = Path(trainer.default_root_dir)
        if trainer.global_step != 2 or own.name not in ("0", "1"):
            return
        if own.name == "0":
            while not (own.parent / "1" / "metrics.csv").exists():
                time.sleep(0.05)
            self.damage(own.parent)
        else:
            while "finished" not in (own.parent / "sweep.csv").read_text():
                time.sleep(0.05)
            time.sleep(2)


class OfStudy(Saboteur):
    def damage(self, swept):
        shutil.copy(swept / "study.db", swept / "whole.db")
        (swept / "study.db").write_bytes(b"no study" * 10_000)


class OfLogs(Saboteur):
    def damage(self, swept):
        (swept / "logs").rename(swept / "moved")
        (swept / "logs").write_text("a file where the folder was")
"""
SEARCH = ["optimizer.lr=interval(1e-4,1e-2)", "hparams_search=optuna", "hparams_search.n_trials=3"]


@pytest.fixture(autouse=True)
def planted(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that every job imports."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def repair_study(swept: Path) -> None:
    shutil.copy(swept / "whole.db", swept / "study.db")


def repair_logs(swept: Path) -> None:
    (swept / "logs").unlink()


@pytest.mark.chaos
@needs_two_cores
@pytest.mark.parametrize(
    ("damage", "keys", "repair", "code", "message", "statuses"),
    [
        ("OfStudy", SEARCH, repair_study, 2, "study.db cannot be used as an Optuna study", ["finished", "finished"]),
        ("OfLogs", ["-m", "seed=1,2,3"], repair_logs, 1, "FileExistsError", ["finished", "finished", "stopped"]),
    ],
)
def test_sweep_that_cannot_start_jobs_is_resumable(
    damage: str,
    keys: list[str],
    repair: Callable[[Path], None],
    code: int,
    message: str,
    statuses: list[str],
    train_process: Train,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    mark, swept = uuid.uuid4().hex, tmp_path / "swept"
    monkeypatch.setenv("MARK", mark)
    saboteur = f"+callbacks.saboteur._target_=planted.{damage}"
    command = [*tiny, *keys, "n_jobs=2", "steps=4", "log_every=1", saboteur, "hydra.sweep.dir=swept"]
    ended = train_process(*command)
    assert ended.code == code, ended.stderr
    assert message in "".join(ended.stderr.splitlines(keepends=True)[-2:])
    assert "No more jobs are started, those that run (1) are finished first" in ended.stderr
    assert f"{swept.name}/sweep.csv" in ended.stdout, "the table is shown"
    assert not marked(mark)
    assert [row["status"] for row in rows(swept)] == statuses
    assert [read_report(swept / job)["status"] for job in ("0", "1")] == ["finished", "finished"]
    assert not (swept / "2").exists()

    repair(swept)
    (continued,) = (line for line in ended.stderr.splitlines() if line.startswith("After fixing this"))
    ended = train_process(*shlex.split(continued.partition("train.py ")[2]))
    assert ended.code == 0, ended.stderr
    assert [row["status"] for row in rows(swept)] == ["finished"] * 3
    assert all(read_report(swept / job)["steps"] == 4 for job in ("0", "1", "2"))
    if damage == "OfStudy":
        assert [trial.value for trial in study(swept).trials] == [float(row["watched"]) for row in rows(swept)]
