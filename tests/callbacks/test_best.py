"""export=best and early_stop_patience: the best validation is kept, exported, resumed and ranked."""

import csv
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import callbacks.checkpoint
import callbacks.export
from callbacks.best import Best, find_best
from gpt2lab.analysis.optuna_storage import STUDY_FILE, load_study
from gpt2lab.evaluation.document_losses import read_document_losses
from gpt2lab.model.backbone import load_backbone
from gpt2lab.model.ema import stored_weights
from gpt2lab.reports.model_card import read_step
from gpt2lab.storage.checkpoint_ledger import checkpoint_folder, newest_good_checkpoint, read_entries
from gpt2lab.storage.metrics_csv import read_metrics, series
from gpt2lab.storage.report_json import read_report
from launch.config.run_dir import finished_runs
from tests.conftest import ROOT, Answer, Distil, Train, environment, needs_two_cores

# The rate is so high that the loss rises after a few steps, and the best validation is neither the first nor the last.
RISING = ("optimizer=adamw", "optimizer.lr=0.2", "schedule=constant", "schedule.warmup_steps=6", "steps=16")
RISING += ("validate_every=2", "checkpoint_every=5", "callbacks.checkpoint.verify_export=false", "model.dropout=0.1")
BEST = ("export=best", "callbacks.checkpoint.keep_last=1", *RISING)


def validations(run: Path) -> list[tuple[int, float]]:
    return series(read_metrics(run), "val/loss")


def best_of(run: Path) -> tuple[int, float]:
    """Return (step, loss) of the first lowest validation loss."""
    return min(validations(run), key=lambda row: row[1])


def exported(run: Path) -> dict[str, str]:
    """Return the hash of each file of hf/, of the card without the command, which names the run directory."""
    files = {str(path.relative_to(run)): path.read_bytes() for path in (run / "hf").rglob("*") if path.is_file()}
    files["hf/README.md"] = re.sub(rb"\bpython \S*train\.py .*", b"", files["hf/README.md"])
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def without_card(files: dict[str, str]) -> dict[str, str]:
    """Leave out the card, whose heading is the name of the run directory."""
    return {name: digest for name, digest in files.items() if name != "hf/README.md"}


@pytest.fixture
def tiny(tiny: list[str], whole_sources: Path) -> list[str]:
    """Overrides of a small run on whole files, on which the loss of RISING rises late."""
    return [*tiny, f"path={whole_sources}"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the teacher, which has another tokenizer than that of the other tests."""
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture
def run(train_here: Train, tiny: list[str]) -> Iterator[Any]:
    def start(*overrides: str) -> Answer:
        answer = train_here(*tiny, *overrides)
        assert answer.code == 0, answer.stderr
        return answer

    return start


@pytest.mark.parametrize("ema", [pytest.param("0.0", marks=pytest.mark.slow), "0.3"])
def test_hf_holds_the_weights_of_the_best_validation(ema: str, run: Any, train_here: Train, tmp_path: Path):
    answer = run(*BEST, f"ema={ema}", "run_dir=run")
    folder, report = tmp_path / "run", read_report(tmp_path / "run")
    step, loss = best_of(folder)
    assert 2 < step < 16
    assert (report["best_step"], report["export"], report["val_loss"]) == (step, "best", loss)
    assert report["metrics"]["val/loss"] == loss
    assert f"val/loss {loss:.4f}" in answer.stdout
    assert [entry.step for entry in read_entries(folder)] == [step, 16]
    best = checkpoint_folder(folder) / "best"
    assert best.resolve().name == f"step-{step:06d}.ckpt"
    weights = load_backbone(str(folder)).lm.state_dict()
    stored = stored_weights(torch.load(best, weights_only=True))
    assert all(torch.equal(weights[name], stored[name]) for name in weights)
    documents = read_document_losses(folder)
    assert documents is not None
    assert sum(documents.nats) / sum(documents.targets) == pytest.approx(loss, rel=1e-5)
    answer = train_here("resume=run", "steps=18")  # continues from the last state
    assert answer.code == 0, answer.stderr
    assert read_report(folder)["steps"] == 18
    assert read_report(folder)["best_step"] == best_of(folder)[0] == read_step(folder / "hf")


def test_report_describes_hf_after_the_best_checkpoint_is_lost(run: Any, train_here: Train, tmp_path: Path):
    run(*BEST, "run_dir=run")
    folder = tmp_path / "run"
    (checkpoint_folder(folder) / "best").resolve().unlink()
    shutil.rmtree(folder / "hf")
    for words in ((), ("steps=18",), ("steps=20",)):
        answer = train_here("resume=run", *words)
        assert answer.code == 0, answer.stderr
        report = read_report(folder)
        losses = dict(validations(folder))
        assert report["val_loss"] == losses[read_step(folder / "hf")]
        assert report["full_val_loss"] == report["val_loss"]
    assert report["best_step"] == read_step(folder / "hf") == min((18, 20), key=lambda step: losses[step])
    assert (checkpoint_folder(folder) / "best").resolve().is_file()


def validated(best: Best, step: int, metrics: dict[str, float]) -> None:
    """Let a validation of a run that watches val/exact end."""
    strategy = SimpleNamespace(broadcast=lambda value, src: value)
    measured = {name: torch.tensor(value) for name, value in metrics.items()}
    trainer: Any = SimpleNamespace(
        sanity_checking=False, callback_metrics=measured, strategy=strategy, global_step=step, is_global_zero=False
    )
    best.on_validation_end(
        trainer, SimpleNamespace(watched_metric="val/exact", validation_documents=None, validation_errors={})
    )


@pytest.mark.parametrize(
    ("rows", "best_step"),
    [
        ([(0.0, 4.0), (0.0, 3.0), (0.0, 3.5)], 2),  # scores of text are often equal: the loss decides
        ([(0.1, 4.0), (0.0, 3.0)], 1),
        ([(0.0, 3.0), (0.1, 4.0), (0.1, 4.0)], 2),
        ([(math.nan, 3.0), (0.0, 4.0), (0.0, math.nan)], 2),
        ([(math.nan, 3.0), (math.nan, 2.0)], None),
    ],
)
def test_loss_decides_between_equal_scores_of_text(rows: list[tuple[float, float]], best_step: int | None):
    best = Best(exports_best=True)
    for step, (score, loss) in enumerate(rows, 1):
        validated(best, step, {"val/exact": score, "val/loss": loss})
    assert best.step == best_step
    assert best.validations_since == len(rows) - (best_step or 0)


OTHER_MOMENTS = ("before export", "after commit")


class PowerCut(BaseException):
    """Ends this process's run as a kill does: nothing is saved after it."""


def cut_power(moment: str, patch: pytest.MonkeyPatch) -> None:
    """End the run in its third save whose weights are exported."""
    module, name = (
        (callbacks.export, "write_hf_folder") if "export" in moment else (callbacks.checkpoint, "commit_checkpoint")
    )
    action, count = vars(module)[name], 0

    def dying(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3 and "before" in moment:
            raise PowerCut
        result = action(*arguments)
        if count == 3:
            raise PowerCut
        return result

    patch.setattr(module, name, dying)


@pytest.mark.parametrize(
    "moment", ["after export", *(pytest.param(one, marks=pytest.mark.slow) for one in OTHER_MOMENTS)]
)
def test_best_export_is_the_same_after_a_power_cut(
    moment: str, run: Any, train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run(*BEST, "run_dir=whole/run")
    with monkeypatch.context() as patch:
        cut_power(moment, patch)
        with pytest.raises(PowerCut):
            run(*BEST, "run_dir=run")
    state = torch.load(newest_good_checkpoint(tmp_path / "run"), weights_only=True)
    # A run that ends before it comes to the exported step again has the best weights up to its own end.
    shutil.copytree("run", "short/run", symlinks=True)
    answer = train_here("resume=short/run", f"steps={state['global_step'] + 1}", "validate_every=100")
    assert answer.code == 0, answer.stderr
    short = read_report(tmp_path / "short" / "run")
    assert read_step(tmp_path / "short" / "run" / "hf") == short["best_step"] <= short["steps"]
    answer = train_here("resume=run")
    assert answer.code == 0, answer.stderr
    assert exported(tmp_path / "run") == exported(tmp_path / "whole" / "run")
    assert read_report(tmp_path / "run")["best_step"] == read_report(tmp_path / "whole" / "run")["best_step"]
    shutil.rmtree(tmp_path / "run" / "hf")  # comes from the kept checkpoint again
    answer = train_here("resume=run")
    assert answer.code == 0, answer.stderr
    assert exported(tmp_path / "run") == exported(tmp_path / "whole" / "run")


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_best_export_is_the_same_after_sigkill_anywhere(tiny: list[str], cache: Path, tmp_path: Path):
    """Every file operation of a run in turn is the last one before a kill."""
    keys = [*tiny, *BEST, "steps=8", "validate_every=1", "checkpoint_every=3"]
    command = [sys.executable, str(ROOT / "tests" / "support" / "killed_start.py"), str(tmp_path), "1", "500", *keys]
    ended = subprocess.run(command, env=environment(cache), capture_output=True, text=True)
    rows = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(rows) > 50, ended.stderr
    whole = exported(tmp_path / str(rows[-1]["n"]) / "run")
    for row in rows:
        folders = [name for name, code in (("run", row["auto"]), ("copy", row["resume"])) if code is not None]
        assert all(row[name] == 0 for name in ("auto", "resume") if row[name] is not None), row
        for name in folders:
            assert without_card(exported(tmp_path / str(row["n"]) / name)) == without_card(whole), (row, name)


STOPPING = (*RISING, "schedule.warmup_steps=1", "early_stop_patience=2", "steps=40", "log_every=1")


@pytest.mark.slow
def test_early_stop_counts_as_finished_and_over_a_resume(run: Any, train_here: Train, tmp_path: Path):
    answer = run(*STOPPING, "name=early")
    folder = tmp_path / "runs" / "pretrain" / "early"
    report = read_report(folder)
    best, last = best_of(folder)[0], validations(folder)[-1][0]
    assert (report["status"], report["best_step"], report["steps"]) == ("stopped early", best, last)
    assert last == best + 4 < 40
    assert "stopped early: " in answer.stdout
    assert [one.folder.name for one in finished_runs()] == ["early"]
    answer = train_here(f"resume={folder}")  # with the same patience it has nothing left to do
    assert answer.code == 0, answer.stderr
    assert (read_report(folder)["status"], read_report(folder)["steps"]) == ("stopped early", last)
    run(*STOPPING, "run_dir=halves", f"steps={last - 2}")  # one validation after the best; the next is the second
    answer = train_here("resume=halves", "steps=40")
    assert answer.code == 0, answer.stderr
    halves = read_report(tmp_path / "halves")
    assert (halves["status"], halves["steps"]) == ("stopped early", last)
    answer = train_here("resume=halves", "early_stop_patience=0", f"steps={last + 1}")
    assert answer.code == 0, answer.stderr
    halves = read_report(tmp_path / "halves")
    assert (halves["status"], halves["steps"]) == ("finished", last + 1)


def test_a_validation_repeated_after_a_failure_counts_once(
    run: Any, tiny: list[str], train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, trainer: Any, *_unused: Any) -> None:
        if find_best(trainer).validations_since == 1:
            raise OSError("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.checkpoint.Checkpoint, "on_validation_end", fails)
        answer = train_here(*tiny, *STOPPING, "run_dir=run")
    assert "Input/output error" in answer.stderr
    assert read_entries(tmp_path / "run")[-1].step == validations(tmp_path / "run")[-1][0]
    answer = train_here("resume=run")
    assert answer.code == 0, answer.stderr
    assert validations(tmp_path / "run")[-1][0] == best_of(tmp_path / "run")[0] + 4


@pytest.mark.usefixtures("jobs_here")
@pytest.mark.parametrize(
    "search", [pytest.param((), marks=pytest.mark.slow), ("hparams_search=optuna", "hparams_search.n_trials=2")]
)
def test_sweeps_rank_by_the_best_validation(
    search: tuple[str, ...], train_here: Train, tiny: list[str], tmp_path: Path
):
    varied = "optimizer.lr=0.1,0.2"
    answer = train_here(*tiny, *BEST, "-m", *search, "early_stop_patience=3", varied, "hydra.sweep.dir=swept")
    assert answer.code == 0, answer.stderr
    with (tmp_path / "swept" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = [best_of(tmp_path / "swept" / row["job"])[1] for row in rows]
    assert [float(row["watched"]) for row in rows] == best
    assert [float(row["val_loss"]) for row in rows] == best
    assert {row["status"] for row in rows} == {"finished"}
    assert any(read_report(tmp_path / "swept" / row["job"])["status"] == "stopped early" for row in rows)
    if search:
        study = load_study(tmp_path / "swept" / STUDY_FILE)
        assert study is not None
        trials = [trial for trial in study.trials if trial.value is not None]  # without a repeated proposal
        assert [trial.value for trial in trials] == pytest.approx(best, rel=1e-5)
        for trial in trials:  # the pruner compares the best value so far
            reported = list(trial.intermediate_values.values())
            assert reported == sorted(reported, reverse=True)


@pytest.mark.slow
def test_adapters_of_the_best_validation_come_back(
    run: Any, train_here: Train, tiny: list[str], sources: Path, tmp_path: Path
):
    """Fine-tuning exports its best by default; LoRA's merged weights and adapter are those of the checkpoint."""
    run("steps=20", "optimizer.lr=1e-2", "run_dir=base")
    lines = [line.strip() for file in sorted(sources.glob("*.py")) for line in file.open() if " = " in line]
    pairs = [line.split(" = ", 1) for line in lines if "\t" not in line and '"' not in line]
    (tmp_path / "pairs.tsv").write_text("source\ttarget\n" + "".join(f"{one}\t{other}\n" for one, other in pairs))
    shape = ("model.n", "data=", "path=", "batch_tokens", "vocab_size")
    keys = [key for key in tiny if not key.startswith(shape)]
    keys += ["task=finetune", "data=pairs", "path=pairs.tsv", "init=base", "batch_sequences=8", "task.lora.rank=2"]
    keys += ["ema=0.3", "task.text.examples=8", "task.text.max_new_tokens=8", *RISING[2:-1], "optimizer.lr=0.05"]
    answer = train_here(*keys, "run_dir=tuned")
    assert answer.code == 0, answer.stderr
    before, report = exported(tmp_path / "tuned"), read_report(tmp_path / "tuned")
    watched = series(read_metrics(tmp_path / "tuned"), report["watched_metric"])
    assert report["watched_metric"] == "val/rougeL"
    losses = dict(validations(tmp_path / "tuned"))
    assert report["best_step"] == max(watched, key=lambda row: (row[1], -losses[row[0]]))[0]
    assert any("adapter" in name for name in before)
    shutil.rmtree(tmp_path / "tuned" / "hf")
    answer = train_here("resume=tuned")
    assert answer.code == 0, answer.stderr
    assert exported(tmp_path / "tuned") == before


@pytest.mark.slow
@needs_two_cores
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_stop_early_together_and_keep_the_best(
    strategy: str, train_process: Train, tiny: list[str], tmp_path: Path
):
    keys = [*tiny, *STOPPING, "export=best", "ema=0.3", "devices=2", f"strategy={strategy}", "run_dir=run"]
    answer = train_process(*keys)
    assert answer.code == 0, answer.stderr
    folder, report = tmp_path / "run", read_report(tmp_path / "run")
    assert (report["status"], report["best_step"]) == ("stopped early", best_of(folder)[0])
    assert read_step(folder / "hf") == report["best_step"] < report["steps"] < 40
    before = exported(folder)
    shutil.rmtree(folder / "hf")
    answer = train_process("resume=run")
    assert answer.code == 0, answer.stderr
    assert exported(folder) == before
    assert read_report(folder)["status"] == "stopped early"


@pytest.mark.slow
@pytest.mark.usefixtures("jobs_here")
def test_studies_rank_by_the_best_validation(distil: Distil, train_here: Train, tiny: list[str], tmp_path: Path):
    distil()  # makes the teacher
    keys = ("experiment=distill_study", "teacher=teacher", "study.seeds=1", "study.lr_factors=[1]", "run_dir=study")
    answer = train_here(*tiny, *keys, "study.inits=[scratch]", *RISING, "export=best", "early_stop_patience=2")
    assert answer.code == 0, answer.stderr
    arms = json.loads((tmp_path / "study" / "study.json").read_text())["arms"]
    with (tmp_path / "study" / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 2
    for row in rows:
        assert float(row["val_loss"]) == best_of(tmp_path / "study" / row["folder"])[1]
    assert {row["status"] for row in rows} == {"finished"}
    assert any(arm["made_steps"] < arm["steps"] for arm in arms)
