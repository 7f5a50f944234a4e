"""A signal ends a validation or a generation of samples between two batches, and the resumed run repeats it."""

import os
import re
import signal
from pathlib import Path

import lightning
import pytest
import torch

from callbacks.samples import Samples
from gpt2lab.generation.decoder import Decoder
from gpt2lab.storage.checkpoint_ledger import newest_good_checkpoint
from gpt2lab.storage.metrics_csv import read_metrics
from gpt2lab.storage.report_json import read_report
from tests.callbacks.test_callbacks import metrics_without_clock, weights
from tests.conftest import Train
from tests.support import tiny_run


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
    """Records the steps with a complete validation, like early stopping and pruning."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer, pl_module) -> None:
        assert "val/loss" in trainer.callback_metrics
        self.steps.append(trainer.global_step)


def run(folder: Path, cache: Path, *extra: lightning.Callback) -> tuple[list[int], list[torch.Tensor]]:
    """Return (validated steps, weights) of a run of 12 steps with samples at 4, 8, 12, validated at 8 and 12."""
    folder.mkdir(exist_ok=True)
    validations, samples = Validations(), Samples(every=4, prompts=["def f("], max_new_tokens=8)
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
    ("step", "batch"),
    [(8, 1), (12, -1), *(pytest.param(*rare, marks=pytest.mark.slow) for rare in [(4, -1), (8, 0), (12, 1), (8, -1)])],
    ids=str,
)
def test_sigterm_in_a_validation_stops_it_and_resume_repeats_it(unbroken, cache, tmp_path, step: int, batch: int):
    """Batch −1 is the end of the step, before its samples are written; others are within the validation after it."""
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


class SignalAtValidationEnd(lightning.Callback):
    """Sends SIGTERM after the batches of the validation after step 2, while its texts are generated."""

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if trainer.global_step == 2 and batch_idx + 1 == trainer.num_val_batches[0]:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_the_texts_of_a_validation(train_here: Train, tiny: list[str], tmp_path: Path, monkeypatch):
    """No token is generated after the signal; the resumed run scores the texts of an unbroken one."""
    generated: list[int] = []
    original = Decoder.read

    def counted(decoder: Decoder, ids: torch.Tensor, **given: bool) -> torch.Tensor:
        generated.append(ids.shape[1])
        return original(decoder, ids, **given)

    lines = [f"{number}\t{number * 7} and {number * 11}" for number in range(120)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["source\ttarget", *lines]) + "\n")
    keys = [key for key in tiny if not key.startswith(("data=", "path=", "batch_tokens", "val_fraction"))]
    keys += ["task=finetune", "init=scratch", "model=nano", "data=pairs", f"path={tmp_path / 'pairs.tsv'}"]
    keys += ["batch_sequences=8", "steps=4", "validate_every=2", "log_every=1", "optimizer=adamw"]
    keys += ["task.text.examples=5", "task.text.max_new_tokens=8"]
    assert train_here(*keys, "run_dir=whole").code == 0
    monkeypatch.setattr(Decoder, "read", counted)
    answer = train_here(
        *keys,
        f"+callbacks.stop._target_={__name__}.SignalAtValidationEnd",
        "run_dir=cut",
    )
    assert answer.code == 75, answer.stderr
    assert len(generated) <= 1
    assert not read_metrics(tmp_path / "cut")[-1].get("val/loss")
    assert "Stopped by SIGTERM after step 2. Continue with: python train.py resume=cut" in answer.stderr
    config = tmp_path / "cut" / "config.yaml"
    config.write_text(re.sub(r" +stop:\n +_target_: .*\n", "", config.read_text()))
    assert train_here("resume=cut").code == 0
    assert metrics_without_clock(tmp_path / "cut") == metrics_without_clock(tmp_path / "whole")
