"""A signal ends a validation or a generation of samples between two batches, and the resumed run repeats it."""

import os
import signal
from pathlib import Path

import lightning
import pytest
import tiny_run
import torch
from test_callbacks import metrics_without_clock, weights

from callbacks.samples import Samples
from gpt2lab.checkpoint_ledger import newest_good_checkpoint
from gpt2lab.run_report import read_report


class SignalIn(lightning.Callback):
    """Sends SIGTERM to this process after validation batch `batch` that follows step `step`, and counts batches."""

    def __init__(self, step: int, batch: int) -> None:
        self.step, self.batch = step, batch
        self.after = 0  # validation batches that began after the signal
        self.sent = False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (
            self.batch < 0
            and trainer.global_step == self.step
            and (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        ):
            self.send()

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.after += self.sent
        if trainer.global_step == self.step and batch_idx == self.batch:
            self.send()

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        assert not pl_module.average._weights, "the averages are no state to train on from"

    def send(self) -> None:
        self.sent = True
        os.kill(os.getpid(), signal.SIGTERM)


class Validations(lightning.Callback):
    """Notes the steps whose validation came to its end, as early stopping and pruning would."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer, pl_module) -> None:
        assert "val/loss" in trainer.callback_metrics
        self.steps.append(trainer.global_step)


def run(folder: Path, cache: Path, *extra: lightning.Callback) -> tuple[list[int], list[torch.Tensor]]:
    """(steps validated, weights) of a run of 12 steps with samples at 4, 8, 12, validated at 8 and 12."""
    folder.mkdir(exist_ok=True)
    validations, samples = Validations(), Samples(str(folder), sample_every=4, prompts=["def f("], max_new_tokens=8)
    _, model = tiny_run.train(folder, cache, extra=[*extra, validations, samples])
    return validations.steps, weights(model)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def unbroken(cache, tmp_path_factory) -> tuple[Path, list[torch.Tensor]]:
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    return folder, run(folder, cache)[1]


@pytest.mark.parametrize(
    ("step", "batch"), [(8, 1), (8, 0), (12, 1), (8, -1), (12, -1), (4, -1)], ids=lambda value: str(value)
)
def test_sigterm_in_a_validation_stops_it_and_resume_repeats_it(unbroken, cache, tmp_path, step: int, batch: int):
    """Batch −1: as the step ends, before its samples are written; else within the validation after the step."""
    whole, expected = unbroken
    stop = SignalIn(step, batch)
    validated, _ = run(tmp_path, cache, stop)
    assert stop.sent
    assert stop.after <= 1, "at most the next batch of the validation is read"
    assert step not in validated
    stopped = read_report(tmp_path)
    assert (stopped["status"], stopped["stopped_by"], stopped["steps"]) == ("stopped", "SIGTERM", step)
    assert newest_good_checkpoint(tmp_path).name == f"step-{step:06d}.ckpt"
    assert not metrics_without_clock(tmp_path)[-1].get("val/loss"), "nothing is logged of half a validation"
    validated, resumed = run(tmp_path, cache)
    assert validated == [other for other in (8, 12) if other >= step]
    assert all(torch.equal(one, other) for one, other in zip(resumed, expected, strict=True))
    assert metrics_without_clock(tmp_path) == metrics_without_clock(whole)
    assert (tmp_path / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert read_report(tmp_path)["status"] == "finished"
    assert (tmp_path / "hf" / "README.md").read_text().replace(tmp_path.name, "") == (
        (whole / "hf" / "README.md").read_text().replace(whole.name, "")
    )
    assert run(tmp_path, cache)[0] == [], "a finished run has no validation left"
