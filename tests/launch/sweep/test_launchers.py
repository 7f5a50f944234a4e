"""launcher=slurm and launcher=ray: the same runs, sweeps, signals and exit codes as on this machine.

SLURM is a cluster of two nodes that is this machine alone (slurm_cluster.py), Ray a cluster started by the run.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, Train, environment, started
from tests.launch.distributed.test_ranks import RUN, losses
from tests.launch.sweep.test_sweep import rows
from tests.support import slurm_cluster

HERE = ["accelerator=cpu", "launcher=slurm", "launcher.executor=local"]
SLURM = ["accelerator=cpu", "launcher=slurm", "launcher.cpus=1"]
RAY = ["accelerator=cpu", "launcher=ray"]

CRASHING = """
import lightning

class Crashing(lightning.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if "seed: 2" in open(trainer.default_root_dir + "/config.yaml").read():
            raise RuntimeError("planted")
"""
PLANTED = "+callbacks.crashing._target_=crashing.Crashing"


@pytest.fixture
def crashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs import a callback that crashes those with seed=2."""
    (tmp_path / "crashing.py").write_text(CRASHING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.slow
def test_sweep_of_submitted_jobs_continues_after_a_crash(
    crashing: None, train_here: Train, tiny: list[str], tmp_path: Path
):
    answer = train_here(*tiny, *HERE, PLANTED, "-m", "seed=1,2", "steps=2", "n_jobs=2", "hydra.sweep.dir=swept")
    assert answer.code == 1, answer.stderr
    first, second = rows(tmp_path / "swept")
    assert (first["status"], second["status"], second["error"]) == ("finished", "failed", "RuntimeError: planted")
    report = json.loads((tmp_path / "swept" / "0" / "report.json").read_text())
    assert float(first["watched"]) == report["val_loss"]
    assert sorted(path.name for path in (tmp_path / "swept" / "logs").iterdir()) == ["job-0.txt", "job-1.txt"]
    assert "planted" in (tmp_path / "swept" / "logs" / "job-1.txt").read_text()


def test_submitted_run_has_local_output_and_exit_code(train_here: Train, tiny: list[str], tmp_path: Path):
    """Its output is shown; a user error has exit code 2 and leaves no file."""
    answer = train_here(*tiny, *HERE, "steps=2", "init=no/such/run")
    assert answer.code == 2
    assert answer.stderr.count("error: init=no/such/run") == 1, answer.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["launcher=slurm"], "Give accelerator=gpu devices=N, or accelerator=cpu."),
        (["launcher=ray", "accelerator=gpu"], "needs the number of GPUs"),
        (["launcher=ray", "accelerator=cpu", "num_nodes=2"], "launcher=ray gives each run one machine"),
        (["launcher=slurm", "accelerator=cpu"], "sbatch is not installed"),
        (["-m", "seed=1,2", "launcher=slurm", "accelerator=cpu"], "sbatch is not installed"),
        (["launcher=ray", "accelerator=cpu", "launcher.partition=gpu"], "launcher=slurm reads it"),
        (["launcher.cpus=2"], "launcher=slurm and launcher=ray read it"),
        (["launcher=slurm", "launcher.time=0", "accelerator=cpu"], "launcher.time=0 is out of range"),
        (["experiment=distill_study", "launcher=ray", "accelerator=cpu"], "one after the other on this machine"),
        (["-m", "launcher=slurm,ray", "accelerator=cpu"], "give one value"),
    ],
)
def test_run_that_cannot_be_submitted_is_refused_at_once(
    keys: list[str], message: str, train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    answer = train_here(*keys)
    assert answer.code == 2, answer.stderr
    assert message in answer.stderr
    assert len(answer.stderr.strip().splitlines()) <= 5
    assert not list(tmp_path.iterdir())


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


def trains(*folders: Path) -> Callable[[], bool]:
    return lambda: all((folder / "metrics.csv").is_file() and losses(folder) for folder in folders)


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of the runs with this working directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder.resolve():
                found.append((process / "cmdline").read_bytes().decode().replace("\0", " "))
        except OSError:
            continue
    return [command for command in found if "launch.run.job" in command]


def saved(folder: Path) -> bool:
    return bool(list((folder / "checkpoints").glob("step-*.ckpt")))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [HERE, RAY], ids=["submitit", "ray"])
def test_ctrl_c_lets_the_jobs_save_and_leaves_none_behind(
    launcher: list[str], cache: Path, tiny: list[str], tmp_path: Path
):
    keys = [*tiny, *launcher, "steps=100000", "log_every=1", "-m", "seed=1,2", "n_jobs=2", "hydra.sweep.dir=swept"]
    process = started(cache, tmp_path, *keys)
    wait_for(trains(tmp_path / "swept" / "0", tmp_path / "swept" / "1"), process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert [row["status"] for row in rows(tmp_path / "swept")] == ["stopped", "stopped"]
    assert saved(tmp_path / "swept" / "0")
    assert saved(tmp_path / "swept" / "1")
    assert not processes_of(tmp_path)


@pytest.mark.slow
def test_a_ray_cluster_runs_a_sweep_of_four_jobs(crashing: None, train_process: Train, tiny: list[str], tmp_path: Path):
    keys = ["-m", "seed=1,2", "optimizer.lr=0.001,0.01", "steps=2", "n_jobs=2", "hydra.sweep.dir=swept"]
    answer = train_process(*tiny, *RAY, PLANTED, *keys)
    assert answer.code == 1, answer.stderr
    table = rows(tmp_path / "swept")
    assert [row["status"] for row in table] == ["finished", "finished", "failed", "failed"]
    assert table[2]["error"] == "RuntimeError: planted"
    assert (tmp_path / "swept" / "logs" / "job-3.txt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [HERE, RAY], ids=["submitit", "ray"])
def test_search_submits_its_jobs(launcher: list[str], train_process: Train, tiny: list[str], tmp_path: Path):
    keys = ["-m", "hparams_search=optuna", "hparams_search.n_trials=2", "optimizer.lr=interval(1e-4,1e-2)", "steps=2"]
    answer = train_process(*tiny, *launcher, *keys, "devices=2", "strategy=ddp", "hydra.sweep.dir=swept")
    assert answer.code == 0, answer.stderr
    table = rows(tmp_path / "swept")
    assert [row["status"] for row in table] == ["finished", "finished"]
    assert len({row["optimizer.lr"] for row in table}) == 2
    assert (tmp_path / "swept" / "0" / "logs" / "rank-1.out").is_file()


@pytest.mark.slow
@pytest.mark.chaos
def test_ray_jobs_end_with_their_submitter(cache: Path, tiny: list[str], tmp_path: Path):
    process = started(cache, tmp_path, *tiny, *RAY, "steps=100000", "log_every=1", "run_dir=run")
    wait_for(trains(tmp_path / "run"), process)
    assert processes_of(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    end = time.monotonic() + 30
    while processes_of(tmp_path) and time.monotonic() < end:
        time.sleep(0.1)
    assert not processes_of(tmp_path)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set SLURM's variables for a test cluster."""
    if not slurm_cluster.is_possible():
        pytest.skip(slurm_cluster.WHY_NOT)
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def queued() -> list[str]:
    """Ids of the jobs that SLURM has."""
    message = subprocess.run(["squeue", "--me", "-h", "-o", "%A"], capture_output=True, text=True, check=True)
    return sorted(message.stdout.split(), key=int)


def process_with(program: str, **variables: str) -> int:
    """Process id of what SLURM runs as `python … program …` with these variables."""
    wanted = {f"{name}={value}".encode() for name, value in variables.items()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found, command = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
        except OSError:
            continue
        if wanted <= set(found.split(b"\0")) and program.encode() in command and not command.startswith(b"srun"):
            return int(process.name)
    raise AssertionError(f"there is no {program} with {variables}")


@pytest.mark.slow
def test_killed_or_cancelled_slurm_jobs_do_not_stop_the_sweep(
    slurm: None, cache: Path, tiny: list[str], tmp_path: Path
):
    keys = ["-m", "steps=100000,2", "seed=1,2", "log_every=1", "n_jobs=2", "hydra.sweep.dir=swept"]
    process = started(cache, tmp_path, *tiny, *SLURM, *keys)
    wait_for(trains(tmp_path / "swept" / "0", tmp_path / "swept" / "1"), process)
    killed, cancelled = queued()
    os.kill(process_with("submitit.core._submit", SLURM_JOB_ID=killed, SLURM_PROCID="0"), signal.SIGKILL)
    subprocess.run(["scancel", cancelled], check=True)
    _, stderr = process.communicate(timeout=250)
    assert process.returncode == 1, stderr
    table = rows(tmp_path / "swept")
    assert [row["status"] for row in table] == ["failed", "stopped", "finished", "finished"]
    assert f"job {killed} ended without a result: FAILED" in table[0]["error"]
    assert saved(tmp_path / "swept" / "1")
    assert not list((tmp_path / "swept" / "logs").glob("submitted*"))


@pytest.mark.slow
def test_ctrl_c_stops_running_and_cancels_pending_slurm_jobs(slurm: None, cache: Path, tiny: list[str], tmp_path: Path):
    """Two jobs of two cores each run; the third waits for a node."""
    keys = [*tiny, *SLURM[:-1], "launcher.cpus=2", "-m", "seed=1,2,3,4", "steps=100000", "log_every=1"]
    process = started(cache, tmp_path, *keys, "n_jobs=3", "hydra.sweep.dir=swept")
    wait_for(trains(tmp_path / "swept" / "0", tmp_path / "swept" / "1"), process)
    assert len(queued()) == 3
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert [row["status"] for row in rows(tmp_path / "swept")] == ["stopped"] * 3
    assert [saved(tmp_path / "swept" / name) for name in "012"] == [True, True, False]
    assert not queued()
    assert not processes_of(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("how", [["scancel", "--signal=USR2"], ["scontrol", "requeue"]], ids=["time is up", "requeue"])
def test_requeued_slurm_job_resumes_from_its_checkpoint(
    how: list[str], slurm: None, cache: Path, tiny: list[str], tmp_path: Path
):
    """SLURM sends USR2 before a job's time limit; it requeues the job itself if a machine fails."""
    keys = [*tiny, "accelerator=cpu", "steps=600", "optimizer=adamw", "model.dropout=0.1", "log_every=1"]
    keys.append("threads=1")  # sums in the same order
    process = started(cache, tmp_path, *keys, *SLURM[1:], "run_dir=run")
    wait_for(trains(tmp_path / "run"), process)
    subprocess.run([*how, queued()[0]], check=True)
    stdout, stderr = process.communicate(timeout=280)
    assert process.returncode == 0, stderr
    assert "stopping after step" in stderr
    assert "\nfinished: val/loss" in stdout
    command = [sys.executable, str(ROOT / "train.py"), *keys, "run_dir=unbroken"]
    subprocess.run(command, cwd=tmp_path, env=environment(cache), check=True, capture_output=True)
    broken, unbroken = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("run", "unbroken"))
    assert all(torch.equal(broken[name], unbroken[name]) for name in unbroken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "unbroken"]


@pytest.mark.slow
@pytest.mark.parametrize("by", ["launcher", "srun"])
def test_two_slurm_nodes_have_the_losses_of_one_process(
    by: str, slurm: None, train_process: Train, cache: Path, tiny: list[str], tmp_path: Path
):
    assert train_process(*tiny, *RUN, "run_dir=alone").code == 0
    keys = [*tiny, *RUN, "num_nodes=2", "strategy=ddp", "run_dir=together"]
    if by == "launcher":
        answer = train_process(*keys, *SLURM)
        assert answer.code == 0, answer.stderr
        shown = answer.stdout
    else:
        command = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, str(ROOT / "train.py"), *keys]
        ended = subprocess.run(command, cwd=tmp_path, env=environment(cache), capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        shown = ended.stdout
    assert shown.count("finished: val/loss") == 1
    assert losses(tmp_path / "together") == pytest.approx(losses(tmp_path / "alone"), abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_stopped_srun_rank_ends_the_run_and_is_named(
    rank: int, slurm: None, cache: Path, tiny: list[str], tmp_path: Path
):
    """Rank 0 has the store for heartbeats, which stops with it."""
    command = ["srun", "-K", "--nodes=2", "--ntasks-per-node=1", sys.executable, str(ROOT / "train.py"), *tiny]
    command += ["steps=100000", "log_every=1", "num_nodes=2", "strategy=ddp", "rank_timeout=8", "run_dir=run"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(cache), stdout=pipe, stderr=pipe, text=True)
    wait_for(trains(tmp_path / "run"), process)
    stopped = process_with(str(ROOT / "train.py"), SLURM_PROCID=str(rank))
    os.kill(stopped, signal.SIGSTOP)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode, stderr
    (message,) = (line for line in stderr.splitlines() if "kept the others waiting" in line)
    assert message.startswith(f"The run failed: rank {rank} "), stderr
    assert not Path(f"/proc/{stopped}").exists()
