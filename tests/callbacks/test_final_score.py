"""The exported weights of a complete run are scored once, on a larger part of the validation split."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning
import pytest

from callbacks.final_score import FinalScore
from gpt2lab.storage.report_json import read_report
from tests.conftest import Command, Train, needs_two_cores, started

WORDS = ("steps=4", "validate_every=4", "threads=1", "seed=1", "callbacks.final_score.tokens=10000000")
SMALL = "validate_tokens=160"
PAIRS = ("task=finetune", "init=start", "data=pairs", "path=pairs.tsv", "context=32", "batch_sequences=8")
PAIRS += ("val_fraction=0.3", "precision=fp32", "logger=none", "callbacks=minimal", "task.lora.rank=2")
PAIRS += ("task.text.max_new_tokens=8",)
# Runs, by what differs between the weights in memory and those in hf/
KINDS: dict[str, tuple[str, ...]] = {
    "averaged": ("ema=0.5", "model.dropout=0.1"),
    "adapters": PAIRS,
    "masked": ("objective=mlm",),
    "half": ("precision=bf16_true",),
    "two ranks": ("devices=2", "strategy=ddp", "accelerator=cpu"),
    "shards": ("devices=2", "strategy=fsdp", "accelerator=cpu"),
}
QUICK = ("adapters",)


def report_of(answer: Any, run: str) -> dict[str, Any]:
    assert answer.code == 0, answer.stderr
    return read_report(run)


@needs_two_cores
@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_final_score_is_the_validation_of_the_whole_split(
    train_here: Train, tiny: list[str], sources: Path, kind: str
) -> None:
    """Training does not depend on validate_tokens, so the other run validates the same weights on all of the split."""
    words = [*tiny, *WORDS, *KINDS[kind]]
    if kind == "adapters":
        lines = [line.strip() for file in sorted(sources.glob("*.py")) for line in file.read_text().splitlines()]
        short = [line for line in lines if 8 < len(line) < 20 and line.isprintable()]
        Path("pairs.tsv").write_text("source\ttarget\n" + "".join(f"{n}\t{line}\n" for n, line in enumerate(short)))
        assert train_here(*tiny, "steps=1", "threads=1", "run_dir=start").code == 0
        words = [*WORDS, *PAIRS, "task.text.examples=0"]
    part = report_of(train_here(*words, SMALL, "run_dir=part"), "part")
    whole = report_of(train_here(*words, "run_dir=whole"), "whole")
    assert part["val_tokens"] < part["full_val_tokens"] == whole["val_tokens"]
    assert part["full_val_loss"] == pytest.approx(whole["val_loss"], rel=1e-5)
    assert part["full_val_loss_error"] == pytest.approx(whole["val_loss_error"], rel=1e-3)
    assert whole["full_val_loss"] == whole["val_loss"]
    assert f"validation loss on {part['full_val_tokens']:,} tokens" in Path("part/report.html").read_text()


def test_the_score_of_a_short_run_reads_no_more_than_it_needs(train_here: Train, tiny: list[str]) -> None:
    words = [*tiny, "steps=8", "threads=1", "batch_tokens=512", SMALL, "run_dir=run"]
    report = report_of(train_here(*words), "run")
    assert report["val_tokens"] < 700 < report["full_val_tokens"] <= 8 * 512 // 4
    assert (
        report_of(train_here(*words[:-1], "callbacks.final_score.tokens=300", "run_dir=few"), "few")["full_val_tokens"]
        <= 300
    )


def test_a_score_lost_by_a_kill_is_computed_once(
    train_here: Train, evaluate_here: Command, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, score = [], FinalScore._score

    def copying(self: FinalScore, trainer: Any, *arguments: Any) -> dict[str, Any]:
        if not scores:  # what a kill leaves behind
            shutil.copytree("run", "killed", symlinks=True)
        scores.append(score(self, trainer, *arguments))
        return scores[-1]

    monkeypatch.setattr(FinalScore, "_score", copying)
    unbroken = report_of(train_here(*tiny, *WORDS, SMALL, "run_dir=run"), "run")
    assert len(scores) == 1
    killed = read_report("killed")
    assert (killed["status"], killed.get("full_val_loss")) == ("finished", None)
    again = report_of(train_here("resume=killed"), "killed")
    assert (again["status"], again["full_val_loss"]) == ("finished", unbroken["full_val_loss"])
    assert again["full_val_loss_error"] == unbroken["full_val_loss_error"]
    assert len(scores) == 2
    assert report_of(train_here("resume=killed"), "killed")["full_val_loss"] == unbroken["full_val_loss"]
    assert len(scores) == 2, "a score that is known is kept"
    assert evaluate_here("checkpoint=run", "validate_tokens=full", "json=scores.json").code == 0
    scored = json.loads(Path("scores.json").read_text())
    assert unbroken["full_val_loss"] == pytest.approx(scored["loss"], rel=1e-5)
    assert unbroken["full_val_tokens"] == scored["tokens"]
    longer = report_of(train_here("resume=killed", "steps=6"), "killed")
    assert longer["full_val_loss"] != unbroken["full_val_loss"]
    assert len(scores) == 3


class KillWhileScoring(lightning.Callback):
    """Ends this process by SIGKILL when the score begins, if KILL_WHILE_SCORING is set."""

    def setup(self, *_unused: Any, **_named: Any) -> None:
        if os.environ.get("KILL_WHILE_SCORING"):
            FinalScore._score = self._kill  # type: ignore[method-assign]

    def _kill(self, *_unused: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


@pytest.mark.slow
def test_resume_adds_the_score_after_a_sigkill(train_here: Train, tiny: list[str], cache: Path, tmp_path: Path) -> None:
    words = [*tiny, *WORDS, SMALL, f"+callbacks.kill._target_={__name__}.KillWhileScoring"]
    killed = started(cache, tmp_path, *words, "run_dir=killed", KILL_WHILE_SCORING="1")
    _, stderr = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, stderr
    report = read_report("killed")
    assert (report["status"], report.get("full_val_loss")) == ("finished", None)
    again = report_of(train_here("resume=killed", f"allow_targets=[{__name__}]"), "killed")
    unbroken = report_of(train_here(*words, "run_dir=unbroken"), "unbroken")
    assert again["full_val_loss"] == unbroken["full_val_loss"]
    assert again["full_val_loss_error"] == unbroken["full_val_loss_error"]


class Stop(lightning.Callback):
    """Sends SIGTERM to this process after step 2."""

    def on_train_batch_end(self, trainer: Any, *_unused: Any) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        pytest.param([f"+callbacks.stop._target_={__name__}.Stop", SMALL], 75, id="a stopped run"),
        pytest.param(["validate_tokens=full"], 0, id="a validation of the whole split"),
        pytest.param(["callbacks.final_score=null", SMALL], 0, id="without the callback"),
        pytest.param(["callbacks.checkpoint=null", SMALL], 0, id="without an export"),
    ],
)
def test_nothing_is_scored_where_it_is_not_needed(
    train_here: Train, tiny: list[str], monkeypatch: pytest.MonkeyPatch, words: list[str], code: int
) -> None:
    monkeypatch.setattr(FinalScore, "_score", None)  # calling it fails now
    assert train_here(*tiny, *WORDS, "run_dir=run", *words).code == code
    report = read_report("run")
    assert report["status"] == ("stopped" if code else "finished")
    assert report.get("full_val_loss") == (report["val_loss"] if words == ["validate_tokens=full"] else None)


def test_a_resumed_run_keeps_its_validate_tokens(train_here: Train, tiny: list[str]) -> None:
    assert train_here(*tiny, "steps=1", "threads=1", "run_dir=run").code == 0
    refused = train_here("resume=run", "steps=2", "validate_tokens=full")
    assert refused.code == 2
    assert "cannot be changed when a run is continued" in refused.stderr
