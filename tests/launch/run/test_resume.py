"""A killed and resumed run ends with the same bytes as an unbroken run."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2lab.reports.samples_jsonl import read_samples
from gpt2lab.storage.checkpoint_ledger import newest_good_checkpoint, read_entries
from gpt2lab.storage.metrics_csv import read_metrics
from gpt2lab.storage.report_json import read_report
from tests.conftest import ROOT, started

TIMED = {"tokens_per_second", "mfu", "memory_gb", "seconds"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def finish(*arguments: str) -> None:
    process = start(*arguments)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr[-3000:]


def kill_after_step(step: int, run_dir: Path, *arguments: str) -> None:
    """Start a run; kill it with SIGKILL once it has saved at `step` or later and trained further."""
    process = start(*arguments)
    while process.poll() is None:
        saved = [entry.step for entry in read_entries(run_dir)]
        logged = [int(row["step"]) for row in read_metrics(run_dir)] if saved else []
        if logged and saved[-1] >= step and logged[-1] > saved[-1]:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.002)
    stderr = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, f"ended before it could be killed: {stderr[-2000:]}"


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def assert_same_end(resumed: Path, unbroken: Path) -> None:
    """Compare weights byte for byte, optimizer state tensor for tensor, and every metric that is not a time."""
    assert digest(resumed / "hf" / "model.safetensors") == digest(unbroken / "hf" / "model.safetensors")
    states = [torch.load(newest_good_checkpoint(run), weights_only=True) for run in (resumed, unbroken)]
    assert states[0]["global_step"] == states[1]["global_step"]
    assert states[0]["tokens_seen"] == states[1]["tokens_seen"]
    assert_equal(states[0]["state_dict"], states[1]["state_dict"])
    assert_equal(states[0]["optimizer_states"], states[1]["optimizer_states"])
    assert_equal(states[0]["lr_schedulers"], states[1]["lr_schedulers"])
    rows = [
        [{k: v for k, v in row.items() if k not in TIMED} for row in read_metrics(run)] for run in (resumed, unbroken)
    ]
    assert rows[0] == rows[1]


def assert_equal(first: object, second: object) -> None:
    sequences = list | tuple  # FSDP2's optimizer state is loaded with lists
    assert type(first) is type(second) or (isinstance(first, sequences) and isinstance(second, sequences))
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert first == second


@pytest.mark.slow
def test_module_resumed_after_sigkill_is_bitwise_equal(cache, tmp_path):
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    program = str(ROOT / "tests" / "support" / "tiny_run.py")
    finish(program, str(unbroken), str(cache), "24")
    kill_after_step(8, resumed, program, str(resumed), str(cache), "24")
    finish(program, str(resumed), str(cache), "24")
    assert_same_end(resumed, unbroken)


TWO_RANKS = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import lightning
from tests.support import tiny_run

class SignalToRankOne(lightning.Callback):
    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_rank == 1 and trainer.global_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

run, cache = map(pathlib.Path, sys.argv[1:3])
tiny_run.train(run, cache, extra=[SignalToRankOne()] if sys.argv[3] == "stop" else [], ranks=2)
"""


@pytest.mark.slow
def test_two_ranks_stop_after_the_same_step_and_resume(cache, tmp_path):
    """One rank alone receives the signal; both stop in order, with one common checkpoint."""
    program, run_dir = tmp_path / "two_ranks.py", tmp_path / "run"
    program.write_text(TWO_RANKS)
    for mode, status in (("stop", "stopped"), ("go on", "finished")):
        ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program))
        finish(*ranks, str(run_dir), str(cache), mode)
        assert read_report(run_dir)["status"] == status
    assert read_report(run_dir)["steps"] == 12
    assert read_report(run_dir)["tokens_seen"] == 12 * 4 * 32


SMALL = ("context=32", "micro_batch=4", "steps=24", "validate_every=8", "checkpoint_every=6", "log_every=2")
SMALL += (
    "model.dropout=0.1",
    "callbacks=minimal",
    "logger=csv",
    "threads=1",
    "compile=false",
    "precision=fp32",
    "devices=1",
)
LANGUAGE = (*SMALL, "data=text", "val_fraction=0.3", "batch_tokens=256")
PAIRS = (*SMALL, "data=pairs", "batch_sequences=8", "val_fraction=0.1")
TINY = ("model.n_layer=2", "model.n_head=2", "model.n_embd=32")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for file in sorted(Path(os.__file__).parent.glob("[a-d]*.py")):
        (folder / file.name).write_bytes(file.read_bytes()[:20_000].rsplit(b"\n", 1)[0])
    return folder


@pytest.fixture(scope="module")
def teacher(cache, sources, tmp_path_factory) -> Path:
    """A pretrained model for distillation and fine-tuning."""
    run_dir = tmp_path_factory.mktemp("teacher") / "run"
    wider = ("model.n_layer=2", "model.n_head=2", "model.n_embd=64")
    finish("train.py", *LANGUAGE, *wider, f"path={sources}", f"run_dir={run_dir}", f"cache_dir={cache}")
    return run_dir


def assignments(sources: Path) -> str:
    """Return pairs from real text as a table: the left and the right side of assignments."""
    lines = [line.strip() for file in sorted(sources.glob("*.py")) for line in file.open(errors="replace")]
    pairs = [line.split(" = ", 1) for line in lines if " = " in line and "\t" not in line and '"' not in line]
    return "source\ttarget\n" + "".join(f"{left}\t{right}\n" for left, right in pairs)


OBJECTIVES = ("prefix_lm", "mlm", "fim", "sampled_softmax")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["pretrain", "distill", "finetune", *OBJECTIVES, "bf16_true"])
def test_train_py_resumed_after_sigkill_is_bitwise_equal(cache, sources, teacher, tmp_path, task):
    """Dropout on, two micro-batches a step, killed in the middle of an epoch."""
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    if task == "finetune":
        (tmp_path / "pairs.tsv").write_text(assignments(sources))
        keys = (*PAIRS, "task=finetune", f"init={teacher}", f"path={tmp_path / 'pairs.tsv'}", "task.text.examples=4")
    elif task == "bf16_true":
        keys = (*LANGUAGE, *TINY, f"path={sources}", "precision=bf16_true", "ema=0.9")
    else:
        of_task = (f"objective={task}", "packing=true") if task in OBJECTIVES else (f"task={task}",)
        keys = (*LANGUAGE, *TINY, f"path={sources}", *of_task)
        keys += ("objective.negatives=100",) if task == "sampled_softmax" else ()
        keys += (f"teacher={teacher}", "preflight=warn") if task == "distill" else ()
    keys += (f"cache_dir={cache}",)
    finish("train.py", *keys, f"run_dir={unbroken}")
    kill_after_step(6, resumed, "train.py", *keys, f"run_dir={resumed}")
    finish("train.py", f"resume={resumed}")
    assert read_report(resumed)["status"] == "finished"
    assert_same_end(resumed, unbroken)


@pytest.mark.slow
def test_sharded_run_saves_whole_tensors_and_resumes(cache, sources, tmp_path):
    run_dir = tmp_path / "run"
    keys = [*LANGUAGE, *TINY, f"path={sources}", f"cache_dir={cache}", f"run_dir={run_dir}"]
    keys = [key for key in keys if not key.startswith(("devices", "callbacks", "steps"))]
    finish("train.py", *keys, "strategy=fsdp", "devices=2", "steps=12", "sample_every=6", "ema=0.9")
    state = torch.load(newest_good_checkpoint(run_dir), weights_only=True)
    assert all(type(tensor) is torch.Tensor for tensor in state["state_dict"].values())
    GPT2LMHeadModel.from_pretrained(run_dir / "hf")
    unbroken = read_report(run_dir)["val_loss"]  # of the averaged weights
    newest_good_checkpoint(run_dir).unlink()
    finish("train.py", f"resume={run_dir}")
    assert read_report(run_dir)["val_loss"] == pytest.approx(unbroken, abs=1e-6)
    finish("train.py", f"resume={run_dir}", "steps=16")
    report = read_report(run_dir)
    assert (report["status"], report["steps"], report["tokens_seen"]) == ("finished", 16, 16 * 8 * 32)


# Random kills

KILLS = 7  # of each of the nine runs
STRATEGIES = {"one process": ("devices=1",), "ddp": ("devices=2", "strategy=ddp"), "fsdp": ("devices=2",)}
STRATEGIES["fsdp"] += ("strategy=fsdp",)
WRITTEN = ("callbacks=default", "callbacks.checkpoint.verify_export=false", "callbacks.samples.max_new_tokens=8")
OFTEN = ("steps=60", "checkpoint_every=3", "sample_every=6", "validate_every=8", "log_every=2", *WRITTEN)


def keys_of(task: str, strategy: str, sources: Path, teacher: Path, folder: Path) -> list[str]:
    """Return the overrides of a task; dropout is on, and every batch has two micro-batches."""
    replaced = ("devices", "callbacks", "steps", "validate_every", "checkpoint_every", "log_every")
    if task == "finetune":
        (folder / "pairs.tsv").write_text(assignments(sources))
        data = [*PAIRS, "task=finetune", f"init={teacher}", f"path={folder / 'pairs.tsv'}", "task.text.examples=4"]
    else:
        data = [*LANGUAGE, *TINY, f"path={sources}", f"task={task}"]
        data += [f"teacher={teacher}"] if task == "distill" else []
    return [*(key for key in data if not key.startswith(replaced)), *OFTEN, *STRATEGIES[strategy]]


def kill_once(process: subprocess.Popen[str], run: Path, chance: random.Random) -> bool:
    """Kill a run at a random instant, sometimes only one of its ranks; return False if it ended before that."""
    rows, seen = chance.randrange(0, 14), len(read_metrics(run))
    while process.poll() is None and len(read_metrics(run)) < seen + rows and not (rows == 0 and run.exists()):
        time.sleep(0.002)
    time.sleep(chance.random() * 0.3)
    if process.poll() is not None:
        return False
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victim = int(chance.choice(children)) if children and chance.random() < 0.3 else process.pid
    try:
        subprocess.run(["kill", "-9", str(victim)], check=True, capture_output=True)
    except subprocess.CalledProcessError:
        process.send_signal(signal.SIGKILL)  # the chosen child had just ended
    process.communicate()
    return process.returncode != 0


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("task", ["pretrain", "distill", "finetune"])
def test_resume_after_random_sigkill_is_bitwise_equal(
    task: str,
    strategy: str,
    cache: Path,
    sources: Path,
    teacher: Path,
    tmp_path: Path,
):
    keys, chance = keys_of(task, strategy, sources, teacher, tmp_path), random.Random(f"{task} {strategy}")
    whole = started(cache, tmp_path, *keys, "run_dir=whole")
    assert whole.communicate()[1].count("Traceback") == 0
    assert whole.returncode == 0
    killed = 0
    while killed < KILLS:
        process = started(cache, tmp_path, *keys, "run_dir=run", "resume=auto")
        if kill_once(process, tmp_path / "run", chance):
            killed += 1
            continue
        assert process.returncode == 0, process.communicate()
        assert_same_files(tmp_path / "run", tmp_path / "whole")
        shutil.rmtree(tmp_path / "run")  # it ended before the kill; the next run is killed instead
    last = started(cache, tmp_path, *keys, "run_dir=run", "resume=auto")
    _, stderr = last.communicate()
    assert last.returncode == 0, stderr
    assert_same_files(tmp_path / "run", tmp_path / "whole")


def assert_same_files(run: Path, whole: Path) -> None:
    """Compare weights, optimizer, metrics.csv and samples.jsonl."""
    assert_same_end(run, whole)
    assert read_samples(run) == read_samples(whole)
    assert read_samples(whole)
