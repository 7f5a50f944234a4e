"""A row of metrics.csv has the values measured at its step; a resumed run has the rows of an unbroken one."""

import shutil
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

import callbacks.checkpoint
from gpt2lab.distillation.on_policy import DATA, TextChoice
from gpt2lab.optim.schedules import learning_rate_factor
from gpt2lab.settings import ScheduleSettings, SequenceSettings
from gpt2lab.storage.checkpoint_ledger import (
    checkpoint_files,
    checkpoint_step,
    commit_checkpoint,
    newest_good_checkpoint,
)
from gpt2lab.storage.metrics_csv import read_metrics, series
from tests.callbacks.test_callbacks import metrics_without_clock
from tests.conftest import Distil, Train
from tests.support import tiny_run

STEPS, PEAK = 11, 1e-3
MIXED = ("sequences=gkd", "sequences.lmbda=0.5", "sequences.max_new_tokens=8", f"steps={STEPS}", "log_every=2")
MIXED += ("optimizer=adamw", f"optimizer.lr={PEAK}", "schedule=cosine", "schedule.warmup_steps=3", "validate_every=3")
MIXED += ("callbacks=default", "callbacks.samples=null", "callbacks.checkpoint.verify_export=false")
MIXED += ("checkpoint_every=4", "callbacks.checkpoint.keep_last=9", "model.dropout=0.1")


def spike_detector(run: Path) -> dict[str, object]:
    return torch.load(newest_good_checkpoint(run), weights_only=True)["callbacks"]["Health"]


def test_rows_hold_measured_values_and_survive_a_kill(distil: Distil, train_here: Train, tmp_path: Path) -> None:
    """Half of the steps train on student text; its cross-entropy is not logged as train/loss."""
    distil(*MIXED, "run_dir=unbroken")
    rows = read_metrics(tmp_path / "unbroken")
    choice = TextChoice(SequenceSettings("gkd", lmbda=0.5), STEPS, seed=1)
    on_data = [step for step in (2, 4, 6, 8, 10, 11) if choice.source(step - 1, buffer_is_full=False) == DATA]
    assert 0 < len(on_data) < 6
    assert [step for step, _ in series(rows, "train/loss")] == on_data
    assert [step for step, _ in series(rows, "train/objective")] == [2, 4, 6, 8, 10, 11]
    assert [step for step, _ in series(rows, "tokens_per_second")] == [2, 4, 6, 8, 10], "step 11 ends no interval"
    assert [step for step, _ in series(rows, "val/loss")] == [3, 6, 9, 11]
    schedule = ScheduleSettings("cosine", warmup_steps=3, final_fraction=0.1)
    used = [PEAK * learning_rate_factor(step - 1, STEPS, schedule) for step, _ in series(rows, "lr")]
    assert [rate for _, rate in series(rows, "lr")] == pytest.approx(used, rel=1e-6)
    losses = [loss for step, loss in series(rows, "train/loss") if step % 2 == 0]
    assert spike_detector(tmp_path / "unbroken")["losses"] == pytest.approx(losses, rel=1e-6)
    for kept in (4, 8):
        shutil.copytree(tmp_path / "unbroken", tmp_path / f"killed-{kept}")
        for file in checkpoint_files(tmp_path / f"killed-{kept}"):
            if checkpoint_step(file) > kept:
                file.unlink()
        assert train_here(f"resume=killed-{kept}").code == 0
        assert metrics_without_clock(tmp_path / f"killed-{kept}") == metrics_without_clock(tmp_path / "unbroken")
        assert spike_detector(tmp_path / f"killed-{kept}") == spike_detector(tmp_path / "unbroken")


class Rates(lightning.Callback):
    """Records the learning rates of each step, as multiples of their peaks."""

    def __init__(self) -> None:
        self.of_step: dict[int, set[float]] = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        groups = optimizer.param_groups
        self.of_step[trainer.global_step + 1] = {round(group["lr"] / group["initial_lr"], 9) for group in groups}


def test_steps_after_a_resume_use_the_schedule_of_its_steps(tmp_path: Path) -> None:
    """The checkpoint of step 4 has the learning rate after the end of a schedule of 4 steps."""
    schedule = ScheduleSettings("wsd", warmup_steps=2, final_fraction=0.1)
    for steps, made in ((4, range(1, 5)), (8, range(5, 9))):
        rates = Rates()
        tiny_run.train(tmp_path / "run", tmp_path / "cache", steps=steps, extra=[rates])
        assert rates.of_step == {step: {round(learning_rate_factor(step - 1, steps, schedule), 9)} for step in made}
    logged = [rate / 1e-2 for _, rate in series(read_metrics(tmp_path / "run"), "lr")]
    used = [learning_rate_factor(step - 1, 4 if step <= 4 else 8, schedule) for step in (2, 4, 6, 8)]
    assert logged == pytest.approx(used, rel=1e-6)


def test_a_row_is_on_disk_before_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power fails just after the checkpoint of step 4 is in the ledger."""
    tiny_run.train(tmp_path / "unbroken", tmp_path / "cache", steps=6)

    def failing(*arguments: Any) -> Path:
        path = commit_checkpoint(*arguments)
        raise RuntimeError(f"power cut after {path}")

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.checkpoint, "commit_checkpoint", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            tiny_run.train(tmp_path / "cut", tmp_path / "cache", steps=6)
    tiny_run.train(tmp_path / "cut", tmp_path / "cache", steps=6)
    assert metrics_without_clock(tmp_path / "cut") == metrics_without_clock(tmp_path / "unbroken")
