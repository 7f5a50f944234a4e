"""A sweep with several ranks a job: each job is one run, independent of others, and no process is left."""

import csv
import json
import os
import signal
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.analysis.optuna_storage import STUDY_FILE, load_study
from gpt2lab.storage.metrics_csv import read_metrics
from gpt2lab.storage.report_json import read_report
from tests.conftest import Train, needs_two_cores, started
from tests.support.offline_wandb import runs_in

PLANTED = """
import json
import os
import signal
from pathlib import Path

import lightning
import torch

from callbacks.same_settings import SameSettings


class Witness(lightning.Callback):
    def on_train_end(self, trainer, pl_module):
        (own,) = (callback.settings_hash for callback in trainer.callbacks if isinstance(callback, SameSettings))
        cores = sorted(os.sched_getaffinity(0))
        seen = {"hash": own, "lr": pl_module.settings.optimizer.lr, "cores": cores, "threads": torch.get_num_threads()}
        seen["gpus"] = os.environ.get("CUDA_VISIBLE_DEVICES")
        (Path(trainer.default_root_dir) / f"witness-{trainer.global_rank}.json").write_text(json.dumps(seen))


class Murderer(lightning.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 3 and pl_module.settings.seed == 666:
            os.kill(os.getpid(), signal.SIGKILL)
"""
WITNESS, MURDERER = (f"+callbacks.planted._target_=planted.{name}" for name in ("Witness", "Murderer"))

OTHER_SEED = """
import os

if os.environ.get("RANK") == "1":
    from dataclasses import replace
    from launch.config import run_spec

    as_written = run_spec.load

    def with_another_seed(file):
        spec = as_written(file)
        return replace(spec, config=replace(spec.config, seed=spec.config.seed + 1))

    run_spec.load = with_another_seed
"""

FOUR_CORES = """
import os

if len(os.sched_getaffinity(0)) < 4:
    os.sched_getaffinity = lambda pid: set(map(int, os.environ.get("PLANTED_CORES", "0,1,2,3").split(",")))
    os.sched_setaffinity = lambda pid, cores: os.environ.update(PLANTED_CORES=",".join(map(str, cores)))
"""


@pytest.fixture(autouse=True)
def planted(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that every process of a run imports from; as `sitecustomize` a module is imported before all others."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as stream:
        return list(csv.DictReader(stream))


def seen(job: Path) -> list[dict[str, Any]]:
    """Return the records of the witness of each rank of a job."""
    return [json.loads(file.read_text()) for file in sorted(job.glob("witness-*.json"))]


def check_one_run_each(swept: Path, ranks: list[int]) -> None:
    """Check that each job has a folder, checkpoints, a W&B run, and equal settings on all ranks."""
    assert sorted(path.name for path in swept.iterdir() if path.is_dir()) == [str(job) for job in range(len(ranks))]
    found, hashes = [], set()
    for job, devices in enumerate(ranks):
        folder = swept / str(job)
        assert len(list(folder.glob("config.yaml"))) == len(list(folder.rglob("report.json"))) == 1
        assert sorted(path.name for path in folder.rglob("*.ckpt")) == ["step-000002.ckpt"]
        assert len(list(folder.rglob("model.safetensors"))) == 1
        witnesses = seen(folder)
        assert len(witnesses) == devices
        (own,) = {witness["hash"] for witness in witnesses}
        hashes.add(own)
        found += runs_in(folder)
    assert len(hashes) == len(ranks)
    assert [run.display_name.rpartition("-")[2] for run in found] == [f"job{job}" for job in range(len(ranks))]
    assert {run.run_group for run in found} == {swept.name}
    assert len({run.run_id for run in found}) == len(ranks)


@pytest.mark.slow
@needs_two_cores
def test_a_job_on_two_ranks_is_one_run(train_process: Train, tiny: list[str], tmp_path: Path):
    sweep = ["-m", "steps=2", "devices=2", "logger=wandb", WITNESS, "hydra.sweep.dir=swept"]
    answer = train_process(*tiny, *sweep)
    assert answer.code == 0, answer.stderr
    check_one_run_each(tmp_path / "swept", ranks=[2])
    assert [path.name for path in tmp_path.iterdir()] == ["swept"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_job_of_any_task_on_one_or_two_ranks_is_one_run(
    strategy: str, train_process: Train, tiny: list[str], tmp_path: Path
):
    assert train_process(*tiny, "model.n_embd=64", "steps=6", "run_dir=teacher").code == 0
    keys = ["task=pretrain,distill", "teacher=teacher", "preflight=off", "model=nano", "devices=1,2", "steps=2"]
    sweep = [f"strategy={strategy}", "logger=wandb", WITNESS, "hydra.sweep.dir=swept"]
    answer = train_process("-m", *tiny, *keys, *sweep)
    assert answer.code == 0, answer.stderr
    check_one_run_each(tmp_path / "swept", ranks=[1, 2, 1, 2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["swept", "teacher"]
    losses = [float(row["watched"]) for row in rows(tmp_path / "swept")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
    assert losses[2] == pytest.approx(losses[3], abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_of_an_unseeded_search_job_share_its_values(
    strategy: str, train_process: Train, tiny: list[str], tmp_path: Path
):
    search = ["hparams_search=optuna", "hparams_search.sampler=random", "hparams_search.seed=null"]
    keys = ["hparams_search.n_trials=2", "optimizer.lr=interval(1e-4,1e-2)", "steps=2", "devices=2"]
    sweep = [f"strategy={strategy}", "logger=wandb", WITNESS, "hydra.sweep.dir=swept"]
    answer = train_process(*tiny, *search, *keys, *sweep)
    assert answer.code == 0, answer.stderr
    swept = tmp_path / "swept"
    check_one_run_each(swept, ranks=[2, 2])
    assert [path.name for path in tmp_path.iterdir()] == ["swept"]
    study = load_study(swept / STUDY_FILE)
    assert study is not None
    drawn = [trial.params["optimizer.lr"] for trial in study.trials]
    assert drawn[0] != drawn[1]
    for job, lr in enumerate(drawn):
        assert [witness["lr"] for witness in seen(swept / str(job))] == [lr, lr]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_rank_with_other_settings_ends_the_run_before_training(
    strategy: str, train_process: Train, tiny: list[str], tmp_path: Path, planted: Path
):
    (planted / "sitecustomize.py").write_text(OTHER_SEED)
    answer = train_process(*tiny, "steps=2", "devices=2", f"strategy={strategy}", "run_dir=run")
    assert answer.code == 1
    assert "rank 1 ended with code 1: RuntimeError: rank 1 has other settings" in answer.stderr.splitlines()[-1]
    assert not read_metrics(tmp_path / "run")


@pytest.mark.chaos
def test_sweep_continues_after_divergence_and_a_killed_rank(train_process: Train, tiny: list[str], tmp_path: Path):
    """The lost jobs come first: one of 1e38 · the gradient as step, and one whose second rank is killed."""
    keys = ["optimizer=adamw", "gradient_clip=0", "optimizer.lr=1e38,1e-3", "seed=1,666", "steps=6", "devices=2"]
    answer = train_process("-m", *tiny, *keys, MURDERER, "hydra.sweep.dir=swept")
    assert answer.code == 1
    assert answer.stderr.splitlines()[-1] == "3 of 4 jobs failed."
    swept = tmp_path / "swept"
    table = rows(swept)
    assert [row["status"] for row in table] == ["failed", "failed", "finished", "failed"]
    for row in table[:2]:
        assert "the loss or its gradient is not finite at step 2" in row["error"]
    assert table[3]["error"] == "The run in swept/3 failed: rank 1 was killed by SIGKILL."
    assert [read_report(swept / str(job)).get("status") for job in range(4)] == [row["status"] for row in table]
    assert (swept / "3" / "logs" / "rank-1.err").is_file()
    assert float(table[2]["watched"]) > 0


def marked(mark: str) -> list[int]:
    """Return the processes with the mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_sweep_on_ranks_leaves_no_process(
    number: int, cache: Path, tiny: list[str], tmp_path: Path, planted: Path
):
    """No job, rank, data worker or W&B service is left; on an interrupt all jobs save first."""
    (planted / "sitecustomize.py").write_text(FOUR_CORES)
    mark = uuid.uuid4().hex
    keys = ["seed=1,2,3", "n_jobs=2", "devices=2", "steps=100000", "log_every=1", "workers=1", "logger=wandb"]
    process = started(cache, tmp_path, "-m", *tiny, *keys, "hydra.sweep.dir=swept", MARK=mark)
    jobs = [tmp_path / "swept" / name for name in ("0", "1")]
    while not all(len(read_metrics(job)) > 1 for job in jobs):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    assert len(marked(mark)) >= 1 + 2 + 4 + 4, "the sweep, its jobs, their ranks, and a loader for each of those"
    process.send_signal(number)
    process.communicate(timeout=90)
    end = time.monotonic() + 20
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left
    assert not (tmp_path / "swept" / "2").exists()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert [row["status"] for row in rows(tmp_path / "swept")] == ["stopped", "stopped"]
        assert all(list(job.glob("checkpoints/step-*.ckpt")) for job in jobs)


@pytest.mark.slow
@needs_two_cores
def test_concurrent_jobs_share_out_cores_and_gpus(
    train_here: Train, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """GPUs are names in the environment of jobs, which need not exist."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    cores = os.sched_getaffinity(0)
    answer = train_here("-m", *tiny, "seed=1,2", "n_jobs=2", "steps=2", WITNESS, "hydra.sweep.dir=swept")
    assert answer.code == 0, answer.stderr
    (first,), (second,) = (seen(tmp_path / "swept" / job) for job in ("0", "1"))
    assert set(first["cores"]) | set(second["cores"]) == cores
    assert not set(first["cores"]) & set(second["cores"])
    assert [job["gpus"] for job in (first, second)] == ["4", "6,7"]
    assert [job["threads"] for job in (first, second)] == [len(job["cores"]) for job in (first, second)]
    assert (tmp_path / "swept" / "logs" / "job-1.txt").read_text().splitlines()[-1].startswith("finished:")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_pruned_job_ends_on_all_its_ranks(
    strategy: str, train_process: Train, tiny: list[str], tmp_path: Path, planted: Path
):
    """Two jobs of two ranks run at a time; the last one hardly learns and is pruned."""
    (planted / "sitecustomize.py").write_text(FOUR_CORES)
    keys = ["optimizer=adamw", "schedule=constant", "steps=24", "validate_every=6", "optimizer.lr=1e-2,3e-3,1e-7"]
    search = ["hparams_search=optuna", "hparams_search.sampler=random", "hparams_search.seed=10"]
    search += ["hparams_search.n_trials=3", "hparams_search.n_startup_trials=1", "n_jobs=2", "devices=2"]
    answer = train_process(*tiny, *keys, *search, f"strategy={strategy}", WITNESS, "hydra.sweep.dir=swept")
    assert answer.code == 0, answer.stderr
    table = rows(tmp_path / "swept")
    assert float(table[2]["optimizer.lr"]) == 1e-7, "the seed is to draw it last"
    assert table[2]["status"] == "pruned"
    assert {row["status"] for row in table} == {"pruned", "finished"}
    for row in table:
        folder = tmp_path / "swept" / row["job"]
        assert (read_report(folder)["steps"] < 24) == (row["status"] == "pruned")
        assert [witness["lr"] for witness in seen(folder)] == [float(row["optimizer.lr"])] * 2
