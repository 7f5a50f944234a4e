"""Students of one teacher share its cache: jobs of a sweep, and processes that start at the same time."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray

from gpt2lab.storage.report_json import read_report
from tests.conftest import ROOT, Distil, Train, environment

READS = "the teacher reads"
CACHED = ("task=distill", "teacher=teacher", "teacher_cache=sampled", "seed=1", "optimizer=adamw", "steps=4")


def nats(folder: Path, side: str) -> NDArray[np.float32]:
    """Return the teacher's loss on each sample of a split; NaN where the cache has none."""
    return np.fromfile(folder / f"{side}.nats", "<f4")


@pytest.mark.slow
def test_sweep_jobs_write_one_cache_once(
    distil: Distil,
    train_process: Train,
    tiny: list[str],
    tmp_path: Path,
) -> None:
    """Two students of different size train on the same windows of text."""
    keys = [*tiny, *CACHED, f"cache_dir={tmp_path / 'shared'}", "hydra.sweep.dir=swept"]
    done = train_process(*keys, "-m", "model.n_layer=2,1")
    assert done.code == 0, done.stderr
    assert done.stderr.count(READS) == 1
    (folder,) = (tmp_path / "shared" / "teachers").glob("*/")
    second_job = (tmp_path / "swept" / "1" / "config.yaml").stat().st_mtime
    for side in ("train", "val"):
        for part in ("bin", "index", "nats"):
            assert (folder / f"{side}.{part}").stat().st_mtime < second_job
    reports = [read_report(tmp_path / "swept" / job) for job in ("0", "1")]
    assert reports[0]["parameters"] > reports[1]["parameters"]
    assert reports[0]["teacher"] == reports[1]["teacher"]


@pytest.fixture
def start(cache: Path, tiny: list[str], tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start train.py on the cache of `distil`; its stderr goes into a file named after its run directory."""
    running: list[subprocess.Popen[str]] = []

    def run(name: str) -> subprocess.Popen[str]:
        keys = [*tiny, *CACHED, f"cache_dir={tmp_path / 'cache'}", f"run_dir={name}"]
        with (tmp_path / f"{name}.stderr").open("w") as stderr:
            command = [sys.executable, str(ROOT / "train.py"), *keys]
            process = subprocess.Popen(command, cwd=tmp_path, env=environment(cache), stderr=stderr, text=True)
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_concurrent_processes_write_the_cache_once(
    distil: Distil,
    start: Callable[[str], subprocess.Popen[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This test holds the cache's lock until both processes wait for it, so that they compete for it."""
    distil(*CACHED, "steps=1", "run_dir=first")
    (folder,) = (tmp_path / "cache" / "teachers").glob("*/")
    assert np.isfinite(nats(folder, "train")).sum() == 8
    names = ("one", "other")
    with FileLock(f"{folder}.lock"):
        processes = [start(name) for name in names]
        while not all("waiting for another process" in stderr_of(tmp_path, name) for name in names):
            assert all(process.poll() is None for process in processes), [stderr_of(tmp_path, name) for name in names]
            time.sleep(0.05)
        assert np.isfinite(nats(folder, "train")).sum() == 8
    for process, name in zip(processes, names, strict=True):
        assert process.wait(timeout=120) == 0, stderr_of(tmp_path, name)
    assert sorted(stderr_of(tmp_path, name).count(READS) for name in names) == [0, 1]
    assert np.isfinite(nats(folder, "train")).sum() == 4 * 8
    assert np.isfinite(nats(folder, "val")).all()
    monkeypatch.setattr(
        "gpt2lab.distillation.teacher.load_backbone", None
    )  # the cache is complete: the teacher need not be loaded
    assert READS not in distil(*CACHED, "run_dir=last").stderr
    losses = {read_report(tmp_path / run)["val_loss"] for run in ("one", "other")}
    assert len(losses) == 1


def stderr_of(folder: Path, name: str) -> str:
    return (folder / f"{name}.stderr").read_text()
