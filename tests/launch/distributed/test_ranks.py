"""Two CPU ranks: the losses of one process under ddp and fsdp; signals and killed ranks end the run in order."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from gpt2lab.storage.checkpoint_ledger import checkpoint_step, newest_good_checkpoint
from gpt2lab.storage.metrics_csv import read_metrics
from gpt2lab.storage.report_json import read_report
from tests import conftest
from tests.conftest import ROOT, Train, environment

RANK_TIMEOUT = 20  # seconds: more than a step takes on a busy machine


def losses(folder: Path) -> list[float]:
    rows = read_metrics(folder)
    return [float(row[name]) for row in rows for name in ("train/loss", "val/loss") if row.get(name)]


FAILING = """
import lightning
from callbacks.export import Export

class Failing(lightning.Callback):
    def on_train_start(self, trainer, pl_module):
        def fail(*_):
            raise OSError("no more processes")
        Export.verify = fail
"""
RUN = ["steps=6", "log_every=1", "validate_every=3", "micro_batch=2", "optimizer=adamw", "schedule.warmup_steps=2"]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "keys"), [("ddp", ()), ("fsdp", ()), ("fsdp", ("ema=0.5",))])
def test_two_ranks_have_the_losses_of_one(
    strategy: str, keys: tuple[str, ...], train_here: Train, train_process: Train, tiny: list[str], tmp_path: Path
):
    """With averaged weights too, which the validation in the middle exchanges with those that are trained."""
    assert train_here(*tiny, *RUN, *keys, "run_dir=alone").code == 0
    answer = train_process(*tiny, *RUN, *keys, "devices=2", f"strategy={strategy}", "run_dir=run")
    assert answer.code == 0, answer.stderr
    alone, together = losses(tmp_path / "alone"), losses(tmp_path / "run")
    assert len(alone) == len(together) == 8
    assert together == pytest.approx(alone, abs=2e-5)
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()
    assert "\nfinished: val/loss" in answer.stdout


@pytest.mark.slow
def test_two_ranks_score_an_export_that_only_the_first_repairs(train_process: Train, tiny: list[str], tmp_path: Path):
    words = [key for key in tiny if not key.startswith("callbacks")]
    assert train_process(*words, *RUN, "devices=2", "run_dir=run").code == 0
    expected = read_report(tmp_path / "run")["full_val_loss"]
    shutil.rmtree(tmp_path / "run" / "hf")
    answer = train_process("resume=run")
    assert answer.code == 0, answer.stderr
    assert "a later step failed" not in answer.stderr
    assert read_report(tmp_path / "run")["full_val_loss"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_end_together_where_the_export_fails_on_one(
    strategy: str, train_process: Train, tiny: list[str], tmp_path: Path
):
    """The first rank cannot start the process that verifies the export."""
    (tmp_path / "failing.py").write_text(FAILING)
    words = [key for key in tiny if not key.startswith("callbacks")]
    keys = ["devices=2", f"strategy={strategy}", "rank_timeout=60", "run_dir=run"]
    answer = train_process(*words, *RUN, *keys, "+callbacks.failing._target_=failing.Failing")
    assert answer.code == 0, answer.stderr
    assert "a later step failed: OSError: no more processes" in answer.stderr
    assert "Connection closed" not in answer.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "lora"), [("ddp", 0), ("fsdp", 0), ("fsdp", 2)])
def test_two_ranks_score_pairs_like_one_with_an_empty_rank(
    strategy: str, lora: int, train_process: Train, tiny: list[str], tmp_path: Path
):
    """Twelve validation pairs fit into the first rank's one batch; both generate a share of its text."""
    lines = [f"{number}\t{number * 7} and {number * 11}" for number in range(240)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["source\ttarget", *lines]) + "\n")
    keys = [key for key in tiny if not key.startswith(("data=", "path=", "batch_tokens", "val_fraction", "callbacks"))]
    keys += ["task=finetune", "init=scratch", "model=nano", "data=pairs", f"path={tmp_path / 'pairs.tsv'}"]
    keys += ["batch_sequences=8", "steps=4", "validate_every=2", "sample_every=2", "log_every=1", "optimizer=adamw"]
    keys += [
        "task.text.examples=5",
        "task.text.max_new_tokens=8",
        "callbacks.samples.max_new_tokens=8",
    ]
    if lora:  # adapters of weights that are not random
        assert train_process(*keys, "devices=1", "run_dir=base").code == 0
        keys = [key for key in keys if not key.startswith(("model", "vocab", "init"))]
        keys += ["init=base", f"task.lora.rank={lora}"]
    assert train_process(*keys, "devices=1", "run_dir=one").code == 0
    answer = train_process(*keys, "devices=2", f"strategy={strategy}", "run_dir=two")
    assert answer.code == 0, answer.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)
    one, two = (read_metrics(tmp_path / name)[-1]["val/rougeL"] for name in ("one", "two"))
    assert one == two
    errors = [json.loads((tmp_path / name / "report.json").read_text())["val_loss_error"] for name in ("one", "two")]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def started(cache: Path, tmp_path: Path, *overrides: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A run on two ranks that has begun to train, and its ranks' process ids."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "devices=2", *overrides, "log_every=1", "run_dir=run"],
        cwd=tmp_path,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None:
        if len(read_metrics(tmp_path / "run")) > 1:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            return process, [int(child) for child in children]
        time.sleep(0.05)
    raise AssertionError(process.communicate())


@pytest.mark.slow
def test_ctrl_c_saves_and_stops_all_ranks_for_a_resume(
    cache: Path, tmp_path: Path, tiny: list[str], train_process: Train
):
    process, ranks = started(cache, tmp_path, *tiny, "steps=100000")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    stopped = json.loads((tmp_path / "run" / "report.json").read_text())
    assert stopped["status"] == "stopped"
    answer = train_process("resume=run", f"steps={stopped['steps'] + 3}")
    assert answer.code == 0, answer.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["status"], report["steps"]) == ("finished", stopped["steps"] + 3)
    steps = [int(row["step"]) for row in read_metrics(tmp_path / "run")]
    assert steps == sorted(set(steps)), "no step was trained twice"


@pytest.mark.chaos
def test_a_rank_that_dies_ends_the_run(cache: Path, tmp_path: Path, tiny: list[str]):
    process, ranks = started(cache, tmp_path, *tiny, "steps=100000")
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == 1, stderr
    assert "failed" in stderr
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.chaos
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_stopped_rank_ends_the_run_and_is_named(strategy: str, cache: Path, tmp_path: Path, tiny: list[str]) -> None:
    keys = [*tiny, "steps=100000", f"strategy={strategy}", f"rank_timeout={RANK_TIMEOUT}"]
    process, ranks = started(cache, tmp_path, *keys)
    os.kill(ranks[1], signal.SIGSTOP)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    assert "rank 1 (last in step " in stderr.splitlines()[-1], stderr
    assert "rank 0" not in stderr.splitlines()[-1]
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


STUCK = """
import time
import lightning

class Stuck(lightning.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 3:
            time.sleep(1000)
"""


@pytest.mark.chaos
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_stuck_rank_is_named(
    strategy: str, train_process: Train, tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    keys = [
        "+callbacks.stuck._target_=stuck.Stuck",
        "steps=100",
        "devices=2",
        f"strategy={strategy}",
        f"rank_timeout={RANK_TIMEOUT}",
    ]
    answer = train_process(*tiny, *keys, "run_dir=run")
    assert answer.code == 1, answer.stderr
    assert "rank 1 (last between steps 3 and 4)" in answer.stderr.splitlines()[-1], answer.stderr


def ranks_at_work(folder: Path) -> dict[int, int]:
    """Map rank to process id of the runs with this working directory."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            if (process / "cwd").resolve() == folder.resolve():
                ranks = [int(line[5:]) for line in variables if line.startswith(b"RANK=")]
                found.update(dict.fromkeys(ranks, int(process.name)))
        except OSError:
            continue
    return found


def under_torchrun(cache: Path, folder: Path, *keys: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "train.py"), *keys, "log_every=1", "run_dir=run", f"rank_timeout={RANK_TIMEOUT}"]
    variables = environment(cache) | variables
    return subprocess.Popen(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.chaos
@pytest.mark.parametrize("rank", [0, 1])
def test_stopped_torchrun_rank_ends_the_run_and_is_named(
    rank: int, cache: Path, tmp_path: Path, tiny: list[str]
) -> None:
    """No process of ours is the parent of the ranks; they monitor each other."""
    process = under_torchrun(cache, tmp_path, *tiny, "steps=100000", "strategy=ddp")
    while len(read_metrics(tmp_path / "run")) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    ranks = ranks_at_work(tmp_path)
    os.kill(ranks[rank], signal.SIGSTOP)
    _, stderr = process.communicate(timeout=150)
    assert process.returncode == 1, stderr
    (message,) = (line for line in stderr.splitlines() if "kept the others waiting" in line)
    assert message.startswith(f"The run failed: rank {rank} (last "), stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


@pytest.mark.chaos
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_stuck_torchrun_rank_is_named(
    strategy: str, cache: Path, tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    keys = ["+callbacks.stuck._target_=stuck.Stuck", "steps=100", f"strategy={strategy}"]
    process = under_torchrun(cache, tmp_path, *tiny, *keys)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1, stderr
    (message,) = (line for line in stderr.splitlines() if "kept the others waiting" in line)
    assert message.startswith("The run failed: rank 1 (last between steps 3 and 4)"), stderr


STILL = """
import os, signal, time
import lightning

class Still(lightning.Callback):
    def __init__(self, where):
        self.stop("building", where)
        self.where = where

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.stop("validating", self.where)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.stop("saving", self.where)

    def stop(self, here, where):
        if here == where and os.environ["RANK"] == "1":
            time.sleep(3)  # its heart beats every second, and says what it does
            os.kill(os.getpid(), signal.SIGSTOP)
"""
STILL_FROM_THE_START = """
import os, signal
if os.environ.get("RANK") == "1":
    os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("started_by", "where", "doing"),
    [
        ("ours", "starting", "starting"),
        ("ours", "building", "getting ready"),
        ("ours", "validating", "validating after step 2, in batch 1"),
        ("ours", "saving", "saving after step 2"),
        ("torchrun", "starting", "starting"),
        ("torchrun", "building", "getting ready"),
        ("torchrun", "saving", "saving after step 2"),
    ],
)
def test_rank_stuck_outside_training_steps_is_named(
    started_by: str, where: str, doing: str, cache: Path, tmp_path: Path, tiny: list[str]
) -> None:
    """The rank hangs in its first import, before the process group exists, in a validation, or while writing shards."""
    (tmp_path / "still.py").write_text(STILL)
    if where == "starting":
        (tmp_path / "sitecustomize.py").write_text(STILL_FROM_THE_START)
    keys = [*tiny, "+callbacks.still._target_=still.Still", f"+callbacks.still.where={where}", "steps=4"]
    keys += ["validate_every=2", "checkpoint_every=2", "strategy=fsdp", "checkpoint_format=sharded"]
    variables = {"PYTHONPATH": str(tmp_path)}
    if started_by == "ours":
        keys += ["devices=2", f"rank_timeout={RANK_TIMEOUT}", "run_dir=run"]
        process = conftest.started(cache, tmp_path, *keys, **variables)
    else:
        process = under_torchrun(cache, tmp_path, *keys, **variables)
    _, stderr = process.communicate(timeout=150)
    assert process.returncode == 1, stderr
    (message,) = (line for line in stderr.splitlines() if "kept the others waiting" in line)
    assert f"failed: rank 1 (last {doing}) kept the others waiting" in message
    assert not ranks_at_work(tmp_path)


REFUSED = """
import os, time
import lightning
from gpt2lab.errors import InputError

class Refused(lightning.Callback):
    def __init__(self, error, where, seconds):
        self.error = {"mistake": InputError, "fault": OSError}[error]
        self.where = where
        if where == "building":
            self.refuse()
            time.sleep(seconds)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.where == "training" and trainer.global_step == 3:
            self.refuse()

    def refuse(self):
        if os.environ["RANK"] == "1":
            raise self.error("notes.txt cannot be read.")
"""


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("error", "where", "seconds"),
    [("mistake", "training", 0), ("mistake", "building", 90), ("fault", "building", 90), ("fault", "building", 0)],
)
def test_error_of_one_rank_ends_the_run_at_once(
    error: str, where: str, seconds: int, cache: Path, tmp_path: Path, tiny: list[str]
) -> None:
    """Rank 0 waits for it already, or has so many seconds of work left and is stopped during them."""
    (tmp_path / "refused.py").write_text(REFUSED)
    keys = {"_target_": "refused.Refused", "error": error, "where": where, "seconds": seconds}
    given = [*tiny, *(f"+callbacks.refused.{key}={value}" for key, value in keys.items()), "devices=2", "run_dir=run"]
    process = conftest.started(cache, tmp_path, *given, "steps=100", PYTHONPATH=str(tmp_path))
    _, stderr = process.communicate(timeout=100)  # rank_timeout is 1800 seconds
    if error == "mistake":
        assert process.returncode == 2, stderr
        assert stderr.splitlines() == ["error: notes.txt cannot be read."]
    else:
        assert process.returncode == 1, stderr
        message = "The run in run failed: rank 1 ended with code 1: OSError: notes.txt cannot be read."
        assert stderr.splitlines()[-1] == message, stderr
    assert not ranks_at_work(tmp_path)


@pytest.mark.chaos
def test_torchrun_machine_without_the_text_ends_the_run_at_once(
    cache: Path, tmp_path: Path, tiny: list[str], sources: Path
) -> None:
    """Each rank has a separate folder, and only the first has the text."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    (tmp_path / "0" / "text").symlink_to(sources)
    keys = [*tiny, "path=text", f"run_dir={tmp_path / 'run'}", "strategy=ddp", "steps=4"]
    in_own_folder = ["bash", "-c", f'cd $RANK; exec {sys.executable} {ROOT / "train.py"} "$@"', "rank", *keys]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    ended = subprocess.run(
        [*command, *in_own_folder], cwd=tmp_path, env=environment(cache), capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 1, ended.stderr
    (message,) = (line for line in ended.stderr.splitlines() if line.startswith("error: "))
    assert "text" in message, ended.stderr
    assert not any(ranks_at_work(tmp_path / str(rank)) for rank in range(2))


@pytest.mark.chaos
@pytest.mark.parametrize("stopped", [False, True], ids=["lives", "stopped"])
def test_ranks_waiting_for_rank_0_log_it_and_time_out(
    stopped: bool, train_here: Train, cache: Path, tmp_path: Path, tiny: list[str]
) -> None:
    """Another process holds the lock on the tokens that rank 0 needs."""
    keys = [*tiny, f"cache_dir={tmp_path / 'cache'}", "steps=2"]
    assert train_here(*keys, "run_dir=first").code == 0
    (ledger,) = (tmp_path / "cache" / "tokens").glob("*/ledger.json")
    ledger.unlink()
    with FileLock(f"{ledger.parent}.lock"):
        process = under_torchrun(cache, tmp_path, *keys, "strategy=ddp")
        logged = [*heard(process, "waiting for another process that prepares")]
        if stopped:
            os.kill(ranks_at_work(tmp_path)[0], signal.SIGSTOP)
        else:
            logged += heard(process, "still prepares the run")
            logged += heard(process, "still prepares the run")
    _, stderr = process.communicate(timeout=150)
    if stopped:
        assert process.returncode == 1, stderr
        (message,) = (line for line in stderr.splitlines() if "kept the others waiting" in line)
        assert message.startswith("The run failed: rank 0 (last getting ready) kept the others waiting"), stderr
    else:
        assert process.returncode == 0, stderr
        waited = [re.fullmatch(r"Rank 0, on \S+, .* since [\d:]{8}, (\d+) seconds\.", line) for line in logged]
        times = [int(line[1]) // RANK_TIMEOUT for line in waited if line]
        assert times == list(range(1, max(len(times), 2) + 1)), logged


@contextmanager
def unanswered_port(server: str) -> Iterator[int]:
    """A port that refuses connections, or whose server never answers, as that of another program may."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        if server == "silent":
            yield port
    if server == "absent":
        yield port


@pytest.mark.chaos
@pytest.mark.parametrize("server", ["absent", "silent"])
def test_rank_ends_if_rank_0_never_connects(server: str, cache: Path, tmp_path: Path, tiny: list[str]) -> None:
    variables = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    with unanswered_port(server) as port:
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        process = conftest.started(cache, tmp_path, *tiny, "rank_timeout=12", **variables)
        _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1
    message = f"The run failed: rank 1 could not reach rank 0 at 127.0.0.1:{port} for rank_timeout=12 seconds."
    assert stderr.splitlines()[-1] == message, stderr
    assert f"Rank 1 waits for rank 0 at 127.0.0.1:{port}." in stderr


@pytest.mark.chaos
@pytest.mark.parametrize("server", ["absent", "silent"])
def test_variables_of_an_ended_torchrun_are_named(server: str, cache: Path, tmp_path: Path, tiny: list[str]) -> None:
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    variables |= {"TORCHELASTIC_RUN_ID": "old", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with unanswered_port(server) as port:
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        process = conftest.started(cache, tmp_path, *tiny, **variables)
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 2, stderr
    assert stderr.splitlines()[-1].endswith("unset TORCHELASTIC_RUN_ID."), stderr


def heard(process: subprocess.Popen[str], words: str) -> list[str]:
    """Return lines of its stderr up to the one with these words."""
    assert process.stderr is not None
    lines: list[str] = []
    while not lines or words not in lines[-1]:
        lines.append(process.stderr.readline().rstrip())
        assert process.poll() is None, lines
    return lines


@pytest.mark.chaos
def test_ranks_end_with_their_parent(cache: Path, tmp_path: Path, tiny: list[str]):
    process, ranks = started(cache, tmp_path, *tiny, "steps=100000")
    process.kill()
    process.communicate(timeout=30)
    end = time.monotonic() + 10
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def killed_after_a_checkpoint(process: subprocess.Popen[str], rank: int, folder: Path) -> str:
    """Return the output of a run that finished although one rank was killed."""
    while not list((folder / "run" / "checkpoints").glob("step-*.ckpt")):
        time.sleep(0.02)
    os.kill(rank, signal.SIGKILL)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    return stderr


@pytest.mark.chaos
def test_killed_rank_restarts_from_the_last_checkpoint(cache: Path, tmp_path: Path, tiny: list[str]):
    """A run with `max_restarts` restarts, and ends with the weights of an undisturbed run."""
    keys = [*tiny, "steps=400", "checkpoint_every=100", "optimizer=adamw", "model.dropout=0.1"]
    process, ranks = started(cache, tmp_path, *keys, "max_restarts=1")
    stderr = killed_after_a_checkpoint(process, ranks[1], tmp_path)
    assert "rank 1 was killed by SIGKILL. Restart 1 of 1." in stderr
    command = [sys.executable, str(ROOT / "train.py"), *keys, "devices=2", "log_every=1", "run_dir=unbroken"]
    subprocess.run(command, cwd=tmp_path, env=environment(cache), check=True, capture_output=True)
    broken, unbroken = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("run", "unbroken"))
    assert all(torch.equal(broken[name], unbroken[name]) for name in unbroken)


@pytest.mark.chaos
def test_killed_single_process_restarts(cache: Path, tmp_path: Path, tiny: list[str]):
    process, ranks = started(cache, tmp_path, *tiny, "steps=300", "checkpoint_every=50", "devices=1", "max_restarts=1")
    stderr = killed_after_a_checkpoint(process, ranks[0], tmp_path)
    assert "Restart 1 of 1." in stderr
    assert json.loads((tmp_path / "run" / "report.json").read_text())["status"] == "finished"


@pytest.mark.chaos
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("started_by", ["ours", "torchrun"])
def test_killed_rank_is_reported_in_few_lines(
    started_by: str, rank: int, cache: Path, tmp_path: Path, tiny: list[str]
) -> None:
    """The lines name the loss and the resume command; the traceback of the other rank is in its log file."""
    keys = [*tiny, "steps=100000", "checkpoint_every=10", "strategy=ddp"]
    if started_by == "ours":
        process, _ = started(cache, tmp_path, *keys)
    else:
        process = under_torchrun(cache, tmp_path, *keys)
    while len(read_metrics(tmp_path / "run")) < 15:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    ranks = ranks_at_work(tmp_path)
    os.kill(ranks[rank], signal.SIGKILL)
    _, stderr = process.communicate(timeout=150)
    assert process.returncode == 1, stderr
    kept, reached = newest_good_checkpoint(tmp_path / "run"), int(read_metrics(tmp_path / "run")[-1]["step"])
    assert kept is not None
    step, lines = checkpoint_step(kept), stderr.splitlines()
    (message,) = (line for line in lines if line.startswith("The newest checkpoint is of step "))
    lost = f"steps {step + 1} to {reached} or later" if reached > step else "steps after it"
    folder = "run" if started_by == "ours" else str(tmp_path / "run")
    assert message == (
        f"The newest checkpoint is of step {step}; {lost} are lost. Continue with: python train.py resume={folder}"
    )
    assert "gloo" not in stderr
    assert "no step" not in stderr
    assert "gloo" in (tmp_path / "run" / "logs" / f"rank-{1 - rank}.err").read_text()
    if started_by == "ours":
        assert lines[-1] == f"The run in run failed: rank {rank} was killed by SIGKILL."
        assert len(lines) <= 5
    assert not ranks_at_work(tmp_path)


TERMINATED = """
import os, signal
import lightning

class Terminated(lightning.Callback):
    def __init__(self):
        self.sent, self.after = False, 0

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.after += self.sent
        assert self.after <= 1, "the validation continues"
        is_here = trainer.global_rank == 1 and trainer.global_step == 4 and batch_idx == 0
        if is_here and not os.path.exists("sent"):
            self.sent = True
            open("sent", "w").close()
            os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_in_a_validation_stops_all(
    strategy: str, cache: Path, tmp_path: Path, tiny: list[str], train_process: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only rank 1 receives the signal; both stop the validation at the same batch, and the resumed run repeats it."""
    (tmp_path / "terminated.py").write_text(TERMINATED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    keys = [*tiny, "+callbacks.stop._target_=terminated.Terminated", "steps=6", "log_every=1"]
    keys += ["validate_every=4", "micro_batch=2", "model.dropout=0.1", "devices=2", f"strategy={strategy}", "ema=0.9"]
    answer = train_process(*keys, "run_dir=run")
    assert answer.code == 75, answer.stderr
    assert "Stopped by SIGTERM after step 4." in answer.stderr
    assert not read_metrics(tmp_path / "run")[-1].get("val/loss")
    answer = train_process("resume=run", "allow_targets=[terminated]")  # the file `sent` is there
    assert answer.code == 0, answer.stderr
    answer = train_process(*keys, "run_dir=unbroken")
    assert answer.code == 0, answer.stderr
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")
