"""Distillation through train.py and evaluate.py: both report the same figures; incomparable models are refused."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from gpt2lab import metric_names
from gpt2lab.data.tokenizer import load_tokenizer, train_bpe
from gpt2lab.model.backbone import Backbone, load_backbone, to_hf
from gpt2lab.reports.hf_folder import write_hf_folder
from gpt2lab.settings import ModelShape
from gpt2lab.storage.metrics_csv import read_metrics, series
from gpt2lab.storage.model_folder import read_shape
from launch import exit_codes
from launch.config import run_spec
from tests.conftest import ROOT, SHRUNK, Command, Train

STEPS = ["steps=12", "validate_every=6", "optimizer=adamw", "optimizer.lr=1e-2", "schedule.warmup_steps=2"]
# Metrics go through fp32 and seven digits; chunks and batches differ.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache: Path, sources: Path) -> Path:
    """A folder with a teacher, a student trained without it, and one trained with it and the former as baseline."""
    folder = tmp_path_factory.mktemp("project")
    tiny = [*SHRUNK, f"path={sources}"]
    teacher = [*tiny, *STEPS, "steps=40", "validate_every=40", "model.n_embd=64", "name=teacher"]
    student = ["task=distill", "teacher=runs/pretrain/teacher", "baseline=runs/pretrain/scratch", "name=student"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GPT2LAB_CACHE", str(cache))
        patch.setenv("HF_HUB_OFFLINE", "1")
        for words in (teacher, [*tiny, *STEPS, "name=scratch"], [*tiny, *STEPS, *student]):
            patch.setattr(sys, "argv", [str(ROOT / "train.py"), *words])
            assert exit_codes.exit_code(train.command_line) == 0
    return folder


@pytest.fixture
def in_project(runs: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(runs)
    monkeypatch.setenv("GPT2LAB_CACHE", str(cache))
    return runs


@pytest.fixture
def evaluate_here(in_project: Path, evaluate_here: Command) -> Command:
    return evaluate_here


def report_of(run: str | Path) -> dict[str, Any]:
    return json.loads(Path(run, "report.json").read_text())


MODELS = ["checkpoint=runs/distill/student", "teacher=runs/pretrain/teacher", "baseline=runs/pretrain/scratch"]


def test_validation_and_evaluate_report_the_same_figures(evaluate_here: Command, tmp_path: Path) -> None:
    done = evaluate_here(*MODELS, f"json={tmp_path / 'scores.json'}")
    assert done.code == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    report = report_of("runs/distill/student")
    for name in metric_names.DISTILLATION:
        assert scores[name] == pytest.approx(report["metrics"][name], abs=TOLERANCE), name
    assert scores["loss"] == pytest.approx(report["val_loss"], abs=TOLERANCE)
    assert scores["bits_per_byte"] == pytest.approx(report["bits_per_byte"], abs=TOLERANCE)
    teacher, baseline = report_of("runs/pretrain/teacher"), report_of("runs/pretrain/scratch")
    assert scores["teacher"]["loss"] == pytest.approx(teacher["val_loss"], abs=TOLERANCE)
    assert report["teacher"]["val_loss"] == pytest.approx(teacher["val_loss"], abs=TOLERANCE)
    assert scores["baseline"]["loss"] == pytest.approx(baseline["val_loss"], abs=TOLERANCE)
    gap = (baseline["val_loss"] - report["val_loss"]) / (baseline["val_loss"] - teacher["val_loss"])
    assert scores["distill/gap_closed"] == pytest.approx(gap, abs=1e-3)
    speculative = scores["speculative_decoding"]
    assert speculative["acceptance"] == scores["distill/acceptance"]
    error = speculative["acceptance_standard_error"]
    assert abs(speculative["acceptance_measured"] - speculative["acceptance"]) < 4 * error
    for label, _ in metric_names.DISTILLATION.values():
        assert label in done.stdout or label in ("teacher loss", "acceptance"), label
    assert "acceptance, measured" in done.stdout


def test_adding_a_teacher_changes_no_score_of_the_checkpoint(evaluate_here: Command, tmp_path: Path) -> None:
    scores = []
    for number, words in enumerate((MODELS[:1], MODELS[:2])):
        assert evaluate_here(*words, f"json={tmp_path / str(number)}").code == 0
        scores.append(json.loads((tmp_path / str(number)).read_text()))
    alone, compared = scores
    names = ("loss", "perplexity", "bits_per_byte", "tokens", "top1", "top5", "ece")
    assert [compared[name] for name in names] == pytest.approx([alone[name] for name in names], rel=1e-5)
    assert {name: compared["standard_errors"][name] for name in alone["standard_errors"]} == pytest.approx(
        alone["standard_errors"], rel=1e-4
    )
    assert "baseline" not in compared
    assert "distill/gap_closed" not in compared


def test_validations_log_the_figures_and_the_report_has_them(in_project: Path) -> None:
    rows = read_metrics("runs/distill/student")
    for name in metric_names.DISTILLATION:
        assert [step for step, _ in series(rows, name)] == [6, 12], name
    page = Path("runs/distill/student/report.html").read_text()
    assert "The student against its teacher" in page
    for label, says in metric_names.DISTILLATION.values():
        assert f'<td class="name">{label}</td>' in page
        assert says.replace("'", "&#x27;") in page
    assert "The student against" not in Path("runs/pretrain/teacher/report.html").read_text()


@pytest.mark.slow
def test_sampled_drafts_depend_on_the_seed(evaluate_here: Command, tmp_path: Path) -> None:
    measured = []
    for number, seed in enumerate((1, 1, 2)):
        assert evaluate_here(*MODELS[:2], f"seed={seed}", f"json={tmp_path / str(number)}").code == 0
        measured.append(json.loads((tmp_path / str(number)).read_text())["speculative_decoding"]["acceptance_measured"])
    assert measured[0] == measured[1] != measured[2]


def padded(run: str, entries: int, folder: Path) -> Path:
    """The run's model with so many padding tokens; their logits of 0 would have a real probability."""
    original = load_backbone(run)
    shape = replace(original.shape, vocab_size=original.shape.vocab_size + entries)
    longer, weights = Backbone(shape), original.lm.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.zeros(entries, shape.n_embd)])
    longer.lm.load_state_dict(weights)
    write_hf_folder(to_hf(longer), load_tokenizer(run), folder, {"title": "padded"})
    return folder


def test_padding_of_a_vocabulary_changes_no_figure(evaluate_here: Command, tmp_path: Path) -> None:
    student = padded("runs/distill/student", 13, tmp_path / "student")
    teacher = padded("runs/pretrain/teacher", 20, tmp_path / "teacher")
    data = ["data=text", f"path={run_spec.load(Path('runs/distill/student/config.yaml')).config.path}", "context=32"]
    scores = []
    for number, models in enumerate((MODELS[:2], [f"checkpoint={student}", f"teacher={teacher}"])):
        words = [*models, *data, "val_path=own_validation.py", f"json={tmp_path / str(number)}"]
        Path("own_validation.py").write_text(Path(json.decoder.__file__).read_text())
        done = evaluate_here(*words)
        assert done.code == 0, done.stderr
        scores.append(json.loads((tmp_path / str(number)).read_text()))
    assert "Only the first 300 tokens" in done.stdout
    for name in (*metric_names.DISTILLATION, "loss"):
        assert scores[1].get(name) == pytest.approx(scores[0].get(name), abs=1e-6), name
    assert evaluate_here(f"checkpoint={student}", *words[2:]).code == 0
    alone = json.loads((tmp_path / "1").read_text())
    assert alone["loss"] == pytest.approx(scores[0]["loss"], abs=1e-6)


def test_models_that_cannot_be_compared_are_refused(evaluate_here: Command, tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        done = evaluate_here("checkpoint=runs/distill/student", *words)
        assert done.code == 2, done.stderr
        assert len(done.stderr.strip().splitlines()) <= 5, done.stderr
        return done.stderr

    other = train_bpe(iter([Path(json.__file__).read_text()]), 290)
    write_hf_folder(to_hf(Backbone(ModelShape(1, 1, 16, 64, 300))), other, tmp_path / "other", {"title": "other"})
    message = refused(f"teacher={tmp_path / 'other'}")
    assert "have different token ids" in message
    ours, theirs = (load_tokenizer(str(path)).get_vocab() for path in ("runs/distill/student", tmp_path / "other"))
    first = min(token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token))
    assert repr(first) in message
    to_hf(Backbone(ModelShape(1, 1, 16, 64, 300))).save_pretrained(tmp_path / "bare")
    assert "contains no tokenizer" in refused(f"teacher={tmp_path / 'bare'}")
    to_hf(Backbone(ModelShape(1, 1, 16, 8, 300))).save_pretrained(tmp_path / "short")
    assert "a context of 2 to 8 tokens" in refused(f"teacher={tmp_path / 'short'}")
    to_hf(Backbone(ModelShape(1, 1, 16, 64, 200))).save_pretrained(tmp_path / "few")
    assert "200" in refused(f"teacher={tmp_path / 'few'}")
    assert "teacher=./nowhere" in refused("teacher=./nowhere")
    assert "Give teacher= too" in refused("baseline=runs/pretrain/scratch")


# baseline= of train.py


def test_baseline_that_is_not_comparable_is_refused(
    in_project: Path, train_here: Train, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(in_project)
    distill = [*tiny, *STEPS, "task=distill", "teacher=runs/pretrain/teacher", "name=refused"]

    def refused(*words: str) -> str:
        done = train_here(*words)
        assert done.code == 2, done.stderr
        assert len(done.stderr.strip().splitlines()) <= 5, done.stderr
        assert not Path("runs/distill/refused").exists()
        return done.stderr

    def changed(**values: object) -> Path:
        folder = tmp_path / "-".join(values)
        shutil.copytree("runs/pretrain/scratch", folder)
        (folder / "report.json").write_text(json.dumps(report_of(folder) | values))
        return folder

    assert "task=pretrain does not read baseline" in refused(*tiny, "baseline=runs/pretrain/scratch")
    assert "no such folder" in refused(*distill, "baseline=runs/pretrain/scrach")
    assert "no report.json" in refused(*distill, "baseline=runs/pretrain/scratch/hf")
    assert "has not finished: report.json has status=stopped" in refused(
        *distill, f"baseline={changed(status='stopped')}"
    )
    assert "no val_loss" in refused(*distill, f"baseline={changed(val_loss=None)}")
    other_data = changed(data={"name": "text", "hash": "0" * 16, "tokens": 5})
    assert "other data (hash 0000000000000000" in refused(*distill, f"baseline={other_data}")
    assert "was validated on 5 tokens" in refused(*distill, f"baseline={changed(val_tokens=5)}")
    assert "context=32, this run has context=16" in refused(*distill, "baseline=runs/pretrain/scratch", "context=16")
    larger = "another model: {'n_layer': 2, 'n_head': 2, 'n_embd': 32}, this run's student {'n_layer': 3,"
    assert larger in refused(*distill, "baseline=runs/pretrain/scratch", "model.n_layer=3")
    other_tokens = tmp_path / "tokens"
    shutil.copytree("runs/pretrain/scratch", other_tokens)
    train_bpe(iter([Path(json.__file__).read_text()]), 290).save_pretrained(other_tokens / "hf")
    assert "has other token ids, for example" in refused(*distill, f"baseline={other_tokens}")
    (other_tokens / "report.json").write_text("{")
    assert "cannot be read" in refused(*distill, f"baseline={other_tokens}")


def test_resumed_run_keeps_its_deleted_baseline(runs: Path, train_here: Train, tmp_path: Path) -> None:
    """`runs` is copied: the teacher is found by its absolute path, the baseline's loss in config.yaml."""
    shutil.copytree(runs / "runs" / "distill" / "student", "student")
    before = report_of("student")
    done = train_here("resume=student", "steps=14")
    assert done.code == 0, done.stderr
    after = report_of("student")
    assert after["steps"] == 14
    assert (
        after["baseline"] == before["baseline"] == {"val_loss": report_of(runs / "runs/pretrain/scratch")["val_loss"]}
    )
    assert after["metrics"]["distill/gap_closed"] != before["metrics"]["distill/gap_closed"]


def test_pairs_are_compared_at_their_targets_only(
    runs: Path, train_here: Train, evaluate_here: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"{number}\t{number * 7} and {number * 11}" for number in range(120)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["source\ttarget", *lines]) + "\n")
    monkeypatch.chdir(runs)
    keys = [key for key in SHRUNK if not key.startswith(("data=", "batch_tokens", "vocab_size"))]
    keys += ["task=distill", "teacher=runs/pretrain/teacher", "data=pairs", f"path={tmp_path / 'pairs.tsv'}"]
    done = train_here(*keys, "batch_sequences=8", "steps=3", "preflight=warn", f"run_dir={tmp_path / 'run'}")
    assert done.code == 0, done.stderr
    done = evaluate_here(f"checkpoint={tmp_path / 'run'}", MODELS[1], f"json={tmp_path / 'scores.json'}")
    assert done.code == 0, done.stderr
    scores, report = json.loads((tmp_path / "scores.json").read_text()), report_of(tmp_path / "run")
    for name in metric_names.DISTILLATION:
        if name != metric_names.DISTILL_GAP_CLOSED:
            assert scores[name] == pytest.approx(report["metrics"][name], abs=TOLERANCE), name
    tokenizer = load_tokenizer(str(tmp_path / "run"))
    longest = max(len(tokenizer(line.split("\t")[1])["input_ids"]) for line in lines) + 1
    assert scores["tokens"] < longest * 0.5 * len(lines), "more positions than the targets of the validation pairs"


@pytest.mark.slow
def test_two_ranks_report_the_figures_of_one(runs: Path, train_process: Train, tiny: list[str], tmp_path: Path) -> None:
    keys = [*tiny, *STEPS, "task=distill", f"teacher={runs / 'runs/pretrain/teacher'}", "micro_batch=2"]
    keys.append(f"baseline={runs / 'runs/pretrain/scratch'}")
    assert train_process(*keys, "run_dir=one", "devices=1").code == 0
    for strategy in ("ddp", "fsdp"):
        done = train_process(*keys, f"run_dir={strategy}", "devices=2", f"strategy={strategy}")
        assert done.code == 0, done.stderr
        one, two = (report_of(tmp_path / name)["metrics"] for name in ("one", strategy))
        for name in metric_names.DISTILLATION:
            # Positions with a near tie may change sides by rounding.
            assert two[name] == pytest.approx(one[name], abs=2e-3), name
        errors = [report_of(tmp_path / name)["val_loss_error"] for name in ("one", strategy)]
        assert errors[1] == pytest.approx(errors[0], rel=1e-2)
    assert read_shape(tmp_path / "fsdp" / "hf")["vocab_size"] == 300
