"""Two CPU ranks distil like one process, for losses with state and for all sources of models."""

import sys
from pathlib import Path

import pytest

import train
from gpt2lab.storage.checkpoint_ledger import checkpoint_step, newest_good_checkpoint
from gpt2lab.storage.metrics_csv import read_metrics
from gpt2lab.storage.report_json import read_report
from launch import exit_codes
from tests.conftest import ROOT, SHRUNK, Train, needs_two_cores
from tests.support.stop_signal import stop_keys

RUN = ["steps=6", "log_every=1", "validate_every=3", "micro_batch=2", "optimizer=adamw", "schedule.warmup_steps=2"]
# Sums over all ranks; the figures of near ties, such as the agreements, may change by rounding
COMPARED = (
    "train/loss",
    "train/objective",
    "grad_norm",
    "val/loss",
    "distill/kl",
    "distill/tvd",
    "distill/teacher_loss",
)
LOGGED = {name: 6 if name.startswith(("train", "grad")) else 2 for name in COMPARED}  # values in six steps
TOLERANCE = 2e-5  # fp32, sums in another order

# The student is half as wide as its teacher, so comparing hidden states trains a projection too.
CASES = {
    "everything_online": ["loss=taid", "loss.mixing_step=0.1", "loss.hidden_cosine=1", "init=teacher_layers"],
    "hidden_states": ["loss=jsd", "loss.hidden_cosine=1", "loss.hidden_mse=0.1"],
    "taid": ["loss=taid", "loss.mixing_step=0.1"],
    "sampled": ["teacher_cache=sampled"],
    "teacher_layers": ["init=teacher_layers"],
    "sharded_teacher": ["init=teacher_layers", "loss.hidden_cosine=1"],
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, cache: Path, sources: Path) -> Path:
    """A run of four layers, twice as wide as the students."""
    folder = tmp_path_factory.mktemp("teacher")
    wide = ["model.n_layer=4", "model.n_head=4", "model.n_embd=64", "steps=30", "optimizer=adamw", "optimizer.lr=3e-3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GPT2LAB_CACHE", str(cache))
        patch.setattr(sys, "argv", [str(ROOT / "train.py"), *SHRUNK, f"path={sources}", *wide, "run_dir=run"])
        assert exit_codes.exit_code(train.command_line) == 0
    return folder / "run"


def compared(folder: Path) -> dict[str, list[float]]:
    rows = read_metrics(folder)
    return {name: [float(row[name]) for row in rows if row.get(name)] for name in COMPARED}


@needs_two_cores
@pytest.mark.slow
def test_two_ranks_distil_as_one_until_a_signal_and_then_save(
    teacher: Path, train_here: Train, tiny: list[str], tmp_path: Path
) -> None:
    keys = [*tiny, "task=distill", f"teacher={teacher}", *RUN[1:], "steps=12", *CASES["everything_online"]]
    done = train_here(*keys, "devices=1", "run_dir=one")
    assert done.code == 0, done.stderr
    stopped = train_here(*keys, "devices=2", "strategy=ddp", *stop_keys(steps=6, to_parent=True), "run_dir=two")
    assert stopped.code == 75, stopped.stderr
    assert "resume=two" in stopped.stderr
    report = read_report(tmp_path / "two")
    assert (report["status"], report["steps"], report["stopped_by"]) == ("stopped", 7, "SIGTERM")
    assert checkpoint_step(newest_good_checkpoint(tmp_path / "two")) == 7
    both = compared(tmp_path / "one"), compared(tmp_path / "two")
    check_equal(*({name: values[: LOGGED[name]] for name, values in one.items()} for one in both))


def check_equal(one: dict[str, list[float]], two: dict[str, list[float]]) -> None:
    """Compare six steps with two validations on one rank and on two."""
    assert {name: len(values) for name, values in one.items()} == LOGGED
    for name in COMPARED:
        assert two[name] == pytest.approx(one[name], abs=TOLERANCE), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "case"),
    [
        (strategy, case)
        for strategy in ("ddp", "fsdp")
        for case in CASES
        if strategy == "fsdp" or case != "sharded_teacher"
    ],
)
def test_two_ranks_distil_as_one(
    strategy: str,
    case: str,
    teacher: Path,
    train_here: Train,
    tiny: list[str],
    tmp_path: Path,
) -> None:
    keys = [*tiny, "task=distill", f"teacher={teacher}", *RUN, *CASES[case]]
    done = train_here(*keys, "devices=1", "run_dir=one")
    assert done.code == 0, done.stderr
    split = ["strategy.shard_teacher=true"] if case == "sharded_teacher" else []
    done = train_here(*keys, "devices=2", f"strategy={strategy}", *split, "run_dir=two")
    assert done.code == 0, done.stderr
    assert "\nfinished: val/loss" in done.stdout
    assert (tmp_path / "two" / "hf" / "model.safetensors").is_file()
    check_equal(compared(tmp_path / "one"), compared(tmp_path / "two"))
