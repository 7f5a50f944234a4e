"""Distillation between tokenizers through train.py: a student learns with its own tokenizer, or the run is refused."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluate
import train
from gpt2lab import metric_names
from gpt2lab.data.tokenizer import load_tokenizer, train_bpe
from gpt2lab.model.backbone import Backbone, to_hf
from gpt2lab.reports.hf_folder import write_hf_folder
from gpt2lab.settings import ModelShape
from gpt2lab.storage.metrics_csv import read_metrics, series
from gpt2lab.storage.model_folder import read_shape
from launch import exit_codes
from tests.conftest import ROOT, SHRUNK, Train

STEPS = ["steps=12", "validate_every=6", "optimizer=adamw", "optimizer.lr=1e-2", "schedule.warmup_steps=2", "threads=1"]
ULD = ["task=distill", "loss=uld"]
OF_ENTRIES = {
    metric_names.DISTILL_KL,
    metric_names.DISTILL_REVERSE_KL,
    metric_names.DISTILL_TVD,
    metric_names.DISTILL_TOP1_AGREEMENT,
    metric_names.DISTILL_ACCEPTANCE,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, cache: Path, sources: Path) -> str:
    """Train a teacher with a vocabulary of 420 tokens."""
    folder = tmp_path_factory.mktemp("teacher")
    keys = [*SHRUNK, f"path={sources}", *STEPS, "steps=50", "validate_every=50", "model.n_embd=64", "vocab_size=420"]
    keys.append("compile=false")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GPT2LAB_CACHE", str(cache))
        patch.setattr(sys, "argv", [str(ROOT / "train.py"), *keys, "name=teacher"])
        assert exit_codes.exit_code(train.command_line) == 0
    return str(folder / "runs" / "pretrain" / "teacher")


def report_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


def test_a_student_learns_from_a_teacher_with_other_tokens(
    train_here: Train, tiny: list[str], teacher: str, tmp_path: Path
) -> None:
    done = train_here(*tiny, *STEPS, *ULD, f"teacher={teacher}", "run_dir=run")
    assert done.code == 0, done.stderr
    report, rows = report_of(tmp_path / "run"), read_metrics(tmp_path / "run")
    assert read_shape(Path(teacher) / "hf")["vocab_size"] == 420
    assert read_shape(tmp_path / "run" / "hf")["vocab_size"] == 300
    assert load_tokenizer(str(tmp_path / "run")).get_vocab() != load_tokenizer(teacher).get_vocab()
    assert report["val_loss"] < math.log(300) - 0.5, "no better than it began"
    figures = report["metrics"]
    assert not OF_ENTRIES & figures.keys()
    assert 0.5 < figures["distill/matched"] < 1
    assert 0 < figures["distill/uld"] < 2
    assert [step for step, _ in series(rows, "distill/uld")] == [6, 12]
    # The windows differ from the teacher's own, and are shorter in its tokens.
    per_byte = report["teacher"]["val_loss"] * report["bits_per_byte"] / report["val_loss"]
    assert per_byte == pytest.approx(report_of(Path(teacher))["bits_per_byte"], rel=0.05)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "universal logit distance" in page
    assert "KL(teacher" not in page


@pytest.mark.slow
def test_accumulation_changes_nothing_but_rounding(
    train_here: Train, tiny: list[str], teacher: str, tmp_path: Path
) -> None:
    keys = [*tiny, *STEPS, "steps=3", *ULD, f"teacher={teacher}"]
    for folder, split in (("whole", "micro_batch=8"), ("parts", "micro_batch=3")):
        assert train_here(*keys, split, f"run_dir={folder}").code == 0
    whole, parts = (report_of(tmp_path / name)["metrics"] for name in ("whole", "parts"))
    for name in ("train/objective", "train/loss", "val/loss", "distill/uld", "grad_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-3), name


def test_pairs_are_distilled_between_tokenizers(
    train_here: Train, tiny: list[str], teacher: str, tmp_path: Path
) -> None:
    lines = [f"how much is {n} plus {n}?\t{2 * n} é中🙂" for n in range(60)]
    (tmp_path / "pairs.tsv").write_text("source\ttarget\n" + "\n".join(lines) + "\n")
    keys = [key for key in tiny if not key.startswith(("data=", "batch_tokens", "path="))]
    keys += ["data=pairs", f"path={tmp_path / 'pairs.tsv'}", "batch_sequences=8", "context=64", "preflight=warn"]
    done = train_here(*keys, *STEPS, *ULD, f"teacher={teacher}", "run_dir=run")
    assert done.code == 0, done.stderr
    figures = report_of(tmp_path / "run")["metrics"]
    assert 0.3 < figures["distill/matched"] <= 1
    assert series(read_metrics(tmp_path / "run"), "train/loss")[-1][1] < math.log(300)


@pytest.mark.slow
def test_two_ranks_and_bf16_with_a_compiled_head(
    train_process: Train, tiny: list[str], teacher: str, tmp_path: Path
) -> None:
    keys = [*tiny, *STEPS, *ULD, f"teacher={teacher}", "micro_batch=2"]
    for name, more in {
        "one": ["devices=1"],
        "ddp": ["devices=2", "strategy=ddp"],
        "fsdp": ["devices=2", "strategy=fsdp"],
        "bf16": ["precision=bf16", "compile=true"],
    }.items():
        done = train_process(*keys, *more, f"run_dir={name}")
        assert done.code == 0, done.stderr
    one = report_of(tmp_path / "one")["metrics"]
    for name, tolerance in (("ddp", 2e-3), ("fsdp", 2e-3), ("bf16", 5e-2)):
        other = report_of(tmp_path / name)["metrics"]
        assert other["distill/matched"] == pytest.approx(one["distill/matched"], abs=1e-6), name
        assert other["distill/teacher_loss"] == pytest.approx(one["distill/teacher_loss"], rel=tolerance), name
        assert other["val/loss"] == pytest.approx(one["val/loss"], rel=tolerance), name
        assert other["distill/uld"] == pytest.approx(one["distill/uld"], rel=10 * tolerance), name


def test_one_tokenizer_for_both_is_a_warning(
    train_here: Train, tiny: list[str], teacher: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [key for key in tiny if not key.startswith("vocab_size")]
    keys += [*STEPS, "steps=1", "schedule.warmup_steps=0", *ULD, f"teacher={teacher}", "preflight=warn"]
    done = train_here(*keys, "tokenizer=hub", f"tokenizer.source={teacher}")
    assert done.code == 0, done.stderr
    assert "loss=forward_kl teaches more" in done.stderr + caplog.text


def test_student_pruned_from_its_teacher_has_its_tokenizer(
    train_here: Train, tiny: list[str], teacher: str, tmp_path: Path
) -> None:
    keys = [
        *tiny,
        *STEPS,
        "steps=1",
        "schedule.warmup_steps=0",
        *ULD,
        f"teacher={teacher}",
        "init=teacher_layers",
        "preflight=warn",
    ]
    keys += ["model.n_head=1"]
    done = train_here(*keys, "run_dir=run")
    assert done.code == 0, done.stderr
    assert read_shape(tmp_path / "run" / "hf")["vocab_size"] == 420
    message = refused(train_here, teacher, *keys, "tokenizer=bpe")
    assert "init=teacher_layers" in message


# Refusals


def first_difference(teacher: str, run: Path) -> str:
    ours, theirs = load_tokenizer(str(run)).get_vocab(), load_tokenizer(teacher).get_vocab()
    return min(token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token))


def refused(train_here: Train, teacher: str, *words: str) -> str:
    done = train_here(*words)
    assert done.code == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) <= 6, done.stderr  # one line names the teacher
    return done.stderr


@pytest.mark.parametrize("loss", ["forward_kl", "jsd"])
def test_other_losses_show_the_first_tokens_that_differ(
    train_here: Train, tiny: list[str], teacher: str, tmp_path: Path, loss: str
) -> None:
    assert train_here(*tiny, *STEPS, "steps=1", "schedule.warmup_steps=0", "run_dir=student").code == 0
    keys = [*tiny, *STEPS, "task=distill", f"loss={loss}", f"teacher={teacher}", "tokenizer=bpe"]
    message = refused(train_here, teacher, *keys)
    assert repr(first_difference(teacher, tmp_path / "student")) in message
    assert "420" in message
    assert "300" in message
    assert "loss=uld" in message


def test_other_tokens_in_an_equal_vocabulary_size_are_refused(
    train_here: Train, tiny: list[str], teacher: str, tmp_path: Path
) -> None:
    other = train_bpe(iter([Path(json.__file__).read_text()]), 300)
    model = to_hf(Backbone(ModelShape(1, 1, 16, 64, 310)))  # padded
    write_hf_folder(model, other, tmp_path / "other", {"title": "other"})
    keys = [*tiny, *STEPS, "task=distill", f"teacher={tmp_path / 'other'}", "tokenizer=bpe"]
    message = refused(train_here, teacher, *keys)
    assert "number tokens differently" in message
    assert train_here(*tiny, *STEPS, "steps=1", "schedule.warmup_steps=0", "run_dir=student").code == 0
    assert repr(first_difference(str(tmp_path / "other"), tmp_path / "student")) in message


def test_evaluate_shows_the_first_tokens_that_differ(
    train_here: Train, tiny: list[str], teacher: str, tmp_path: Path, monkeypatch, capfd
) -> None:
    assert train_here(*tiny, *STEPS, "steps=1", "schedule.warmup_steps=0", "run_dir=student").code == 0
    for first, second in ((str(tmp_path / "student"), teacher), (teacher, str(tmp_path / "student"))):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", f"checkpoint={first}", f"teacher={second}"])
        capfd.readouterr()
        assert exit_codes.exit_code(evaluate.main) == 2
        message = capfd.readouterr().err
        assert repr(first_difference(teacher, tmp_path / "student")) in message
        assert len(message.strip().splitlines()) <= 5


def test_settings_that_uld_cannot_use_are_refused(
    train_here: Train, tiny: list[str], teacher: str, tmp_path: Path
) -> None:
    keys = [*tiny, *ULD, f"teacher={teacher}"]
    assert "have other positions" in refused(train_here, teacher, *keys, "loss.hidden_mse=1")
    assert "teacher_cache=none" in refused(train_here, teacher, *keys, "teacher_cache=topk")
    assert "loss=jsd reads it" in refused(train_here, teacher, *keys, "loss.beta=0.5")
    to_hf(Backbone(ModelShape(1, 1, 16, 64, 300))).save_pretrained(tmp_path / "bare")
    message = refused(train_here, teacher, *tiny, *ULD, f"teacher={tmp_path / 'bare'}", "preflight=off")
    assert "holds no tokenizer" in message


def test_preflight_refuses_a_teacher_no_better_per_byte(train_here: Train, tiny: list[str], tmp_path: Path) -> None:
    tokenizer = train_bpe(iter([Path(json.__file__).read_text()]), 400)
    torch.manual_seed(0)
    write_hf_folder(to_hf(Backbone(ModelShape(1, 1, 16, 64, 400))), tokenizer, tmp_path / "raw", {"title": "raw"})
    assert train_here(*tiny, *STEPS, "run_dir=student").code == 0
    keys = [*tiny, *STEPS, *ULD, f"teacher={tmp_path / 'raw'}", "init=student", "model=auto"]
    keys = [key for key in keys if not key.startswith("model.")]
    assert "is not below the student's" in refused(train_here, "", *keys)
