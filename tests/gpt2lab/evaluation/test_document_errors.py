"""Standard errors are those between documents for all data, objectives and numbers of ranks."""

import csv
import json
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from gpt2lab.analysis.study_results import CE, KD, SCRATCH, TOKENS, Arm, StudyResults, arm_result, contrasts
from gpt2lab.data.batch import IGNORE_INDEX
from gpt2lab.data.document_groups import WindowDocuments
from gpt2lab.data.objectives import Objective
from gpt2lab.data.pair_template import PairTemplate, encode_pairs
from gpt2lab.data.special_tokens import SpecialTokens
from gpt2lab.data.token_file import TokenFile
from gpt2lab.data.tokenizer import load_tokenizer
from gpt2lab.data.windows import Windows
from gpt2lab.evaluation.document_losses import (
    DocumentLosses,
    loss_difference,
    read_document_losses,
    write_document_losses,
)
from gpt2lab.model.backbone import load_backbone
from gpt2lab.reports import study_html, sweep_html
from gpt2lab.reports.run_report import build_report, write_report
from gpt2lab.settings import ObjectiveSettings
from gpt2lab.storage.damaged_files import warn_once
from gpt2lab.storage.metrics_csv import MetricsFile
from gpt2lab.storage.report_json import read_report
from launch.commands import demo_results
from launch.sweep import results, study_table
from launch.sweep.jobs import Job
from tests.conftest import SHRUNK, Answer, Command, Train
from tests.launch.evaluate.test_scores import write_models

TEXT = "\n".join(Path(module.__file__).read_text() for module in (json, csv, textwrap))
CONTEXT = 32
# Documents of one to 240 lines of real code: many are shorter than a window, some much longer
DOCUMENTS = [text for n in range(40) if (text := "\n".join(TEXT.splitlines()[n * 40 :][: 1 + n * n * 3 % 61]).strip())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tiny models, of which 1 and 2 share a tokenizer, and the documents in every form that data= reads."""
    folder = tmp_path_factory.mktemp("documents")
    write_models(folder, TEXT)
    _write_lines(folder / "val.jsonl", [{"text": text} for text in DOCUMENTS])
    _write_lines(folder / "train.jsonl", [{"text": TEXT}, {"text": TEXT[::-1]}])
    _write_lines(folder / "few.jsonl", [{"text": text} for text in DOCUMENTS[:5]])
    _write_lines(folder / "huge.jsonl", [{"text": text} for text in ["\n".join(DOCUMENTS * 2), *DOCUMENTS]])
    tokenizer = load_tokenizer(str(folder / "1"))
    end, coded = tokenizer.eos_token_id, tokenizer(DOCUMENTS)["input_ids"]
    layouts = {
        "before": [[end, *ids] for ids in coded],
        "behind": [[*ids, end] for ids in coded],  # as nanoGPT's prepare.py writes them
        "nowhere": coded,
    }
    for name, parts in layouts.items():
        (folder / name).mkdir()
        for side in ("train", "val"):
            np.array([token for part in parts for token in part], "<u2").tofile(folder / name / f"{side}.bin")
    # Three pairs of each source text; or two of each file
    lines = [line.strip()[:40] for line in TEXT.splitlines() if len(line.strip()) > 20]
    pairs = [{"source": lines[n // 3], "target": lines[n + 100]} for n in range(66)]
    _write_lines(folder / "other.jsonl", [{"source": f"{n}", "target": line} for n, line in enumerate(lines[:9])])
    _write_lines(folder / "pairs.jsonl", pairs)
    _write_lines(folder / "filed.jsonl", [{**pair, "file": f"{n // 2}.py"} for n, pair in enumerate(pairs)])
    return folder


def _write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def evaluate_here(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluate_here: Command
) -> Callable[..., tuple[Answer, Any]]:
    """evaluate.py in this process, in the folder of the documents: its output and its JSON."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GPT2LAB_CACHE", str(tmp_path / "cache"))
    warn_once.cache_clear()

    def run(*words: str) -> tuple[Answer, Any]:
        done = evaluate_here(*words, f"json={tmp_path / 'scores.json'}")
        assert done.code == 0, done.stderr
        return done, json.loads((tmp_path / "scores.json").read_text())

    return run


def nats_of(model: Path, ids: list[int], stride: int = CONTEXT) -> torch.Tensor:
    """Cross-entropy (len(ids) − 1,) of each token in windows that tile the text, by a plain loop."""
    backbone, tokens = load_backbone(str(model)).eval(), torch.tensor(ids)
    losses, done = [], 0
    with torch.no_grad():
        while done < len(ids) - 1:
            end = min(CONTEXT if not done else done + stride, len(ids) - 1)
            begin = done if stride == CONTEXT else end - CONTEXT
            logits = backbone.logits(tokens[None, begin:end])[0, done - end :]
            losses.append(functional.cross_entropy(logits, tokens[done + 1 : end + 1], reduction="none"))
            done = end
    return torch.cat(losses).double()


def jackknife(values: torch.Tensor, groups: list[int], counts: torch.Tensor | None = None) -> float:
    """The delete-one-group error of Σ values / Σ counts, by a plain loop."""
    numbers, counts = torch.tensor(groups), torch.ones(len(values)) if counts is None else counts
    without = torch.stack([values[numbers != g].sum() / counts[numbers != g].sum() for g in sorted(set(groups))])
    count = len(without)
    return math.sqrt((count - 1) / count * (without - without.mean()).square().sum().item())


def text_of(folder: Path, behind: bool) -> tuple[list[int], list[int]]:
    """Token ids, and for each but the first the document that it belongs to: end-of-text to the one that it ends."""
    tokenizer = load_tokenizer(str(folder / "1"))
    ids, groups = [], []
    for number, part in enumerate(tokenizer(DOCUMENTS)["input_ids"]):
        ids += [*part, tokenizer.eos_token_id] if behind else [tokenizer.eos_token_id, *part]
        groups += [number] * (len(part) + 1) if behind else [max(number - 1, 0), *[number] * len(part)]
    return ids, groups[1:]


LINES = ["data=text", "path=train.jsonl", "val_path=val.jsonl"]


@pytest.mark.parametrize(
    ("words", "behind", "stride"),
    [
        (LINES, False, CONTEXT),
        ([*LINES, "stride=12"], False, 12),
        (["data=bin", "path=before"], False, CONTEXT),
        (["data=bin", "path=behind"], True, CONTEXT),
        ([*LINES, "teacher=2"], False, CONTEXT),
    ],
    ids=["records", "sliding", "end_of_text_before", "end_of_text_behind", "beside_a_teacher"],
)
def test_errors_of_running_text_are_between_documents(
    evaluate_here, folder: Path, words: list[str], behind: bool, stride: int
) -> None:
    _, scores = evaluate_here("checkpoint=1", *words)
    ids, groups = text_of(folder, behind)
    nats = nats_of(folder / "1", ids, stride)
    assert scores["loss"] == pytest.approx(nats.mean().item(), abs=1e-5)
    expected = jackknife(nats, groups)
    assert scores["standard_errors"]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["pairs", "filed"])
def test_errors_of_pairs_are_between_files_or_source_texts(evaluate_here, folder: Path, name: str) -> None:
    _, scores = evaluate_here("checkpoint=1", "data=pairs", "path=other.jsonl", f"val_path={name}.jsonl", "texts=0")
    tokenizer, template = load_tokenizer(str(folder / "1")), PairTemplate("{source}\n\n", "{target}")
    pairs = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    keys = [pair.get("file", pair["source"]) for pair in pairs]
    nats, counts, groups = [], [], []
    texts = [(pair["source"], pair["target"]) for pair in pairs]
    for key, pair in zip(keys, encode_pairs(texts, template, tokenizer, CONTEXT), strict=True):
        if pair is not None:
            losses = nats_of(folder / "1", [*pair.prompt, *pair.response])[-len(pair.response) :]
            nats.append(losses.sum())
            counts.append(len(losses))
            groups.append(keys.index(key))
    assert scores["tokens"] == sum(counts)
    expected = jackknife(torch.stack(nats), groups, torch.tensor(counts))
    assert scores["standard_errors"]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("objective", ["clm", "prefix_lm", "mlm", "fim", "packing"])
def test_every_objective_maps_targets_to_documents(tmp_path: Path, objective: str) -> None:
    end, documents, context = 5, 40, 16
    tokens = np.concatenate([[end, *[10 + n] * (1 + n * n % 23)] for n in range(documents)]).astype("<u2")
    tokens.tofile(tmp_path / "val.bin")
    file = TokenFile(tmp_path / "val.bin", np.dtype("<u2"), context, keep_short=True)
    settings = ObjectiveSettings("clm" if objective == "packing" else objective)
    marks = SpecialTokens(end_of_text=end, mask=1, prefix=2, suffix=3, middle=4, vocab_size=60)
    apart = Objective(settings, marks, end_of_text=end if objective == "packing" else None)
    batch = Windows(file, apart, WindowDocuments(file.tokens, end, "val.bin")).batch(np.arange(len(file)), 0)
    labels = batch.labels[batch.labels != IGNORE_INDEX]
    of_text = labels >= 10  # each document has its own token
    assert batch.documents is not None
    assert len(batch.documents) == len(labels)
    assert batch.documents[of_text].tolist() == (labels[of_text] - 10).tolist()
    assert of_text.sum() > 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=bin", "path=nowhere"], "no end-of-text token"),
        (["data=text", "path=train.jsonl", "val_path=few.jsonl"], "come from 5 documents"),
        (["data=text", "path=train.jsonl", "val_path=huge.jsonl"], "document groups has"),
        (LINES, ""),
    ],
    ids=["no_end_of_text", "few_documents", "huge_document", "enough"],
)
def test_few_or_unknown_documents_give_a_warning(evaluate_here, words: list[str], message: str) -> None:
    done, _ = evaluate_here("checkpoint=1", *words)
    assert message in done.stderr
    assert ("tandard errors" in done.stderr) == bool(message)


def test_models_are_paired_by_document(evaluate_here, folder: Path) -> None:
    done, (first, second, third) = evaluate_here("checkpoint=[123]", *LINES)
    ids, groups = text_of(folder, behind=False)
    apart = nats_of(folder / "2", ids) - nats_of(folder / "1", ids)
    found = second["loss_minus_first"]
    assert found["value"] == pytest.approx(apart.mean().item(), abs=1e-5)
    assert found["standard_error"] == pytest.approx(jackknife(apart, groups), rel=1e-3)
    assert found["low"] < found["value"] < found["high"]
    by_byte = third["bits_per_byte_minus_first"]  # other tokens of the same documents
    assert by_byte["value"] == pytest.approx(third["bits_per_byte"] - first["bits_per_byte"], rel=1e-6)
    assert by_byte["groups"] == found["groups"] == len(DOCUMENTS)
    assert f"{found['low']:.3f} … {found['high']:.3f}" in done.stdout
    assert f"{by_byte['low']:.2f} … {by_byte['high']:.2f}" in done.stdout


def test_the_report_has_the_error_that_evaluate_prints(
    evaluate_here, train_here: Train, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["data=text", f"path={folder / 'train.jsonl'}", f"val_path={folder / 'val.jsonl'}"]
    keys = [key for key in SHRUNK if not key.startswith(("data=", "val_fraction="))]
    done = train_here(*keys, *data, "steps=2", "validate_every=1", "optimizer.lr=0.01", f"run_dir={tmp_path / 'run'}")
    assert done.code == 0, done.stderr
    report = json.loads((tmp_path / "run/report.json").read_text())
    stored = json.loads((tmp_path / "run/val_documents.json").read_text())
    _, scores = evaluate_here(f"checkpoint={tmp_path / 'run'}", *data)
    assert report["val_documents"] == len(stored["nats"]) == scores["groups"] == len(DOCUMENTS)
    assert report["val_loss_error"] == pytest.approx(scores["standard_errors"]["loss"], rel=1e-3)
    assert sum(stored["nats"]) / sum(stored["targets"]) == pytest.approx(report["val_loss"], rel=1e-6)


def _stored(folder: Path, apart: float, data: str = "abc") -> DocumentLosses:
    """A run's files: five documents of which some are much harder than others, and a loss `apart` nats higher."""
    targets = [200, 50, 100, 150, 80]
    nats = [n + apart * (t + 9 * k) for k, (n, t) in enumerate(zip((900, 100, 330, 700, 240), targets, strict=True))]
    losses = DocumentLosses([0, 1, 2, 3, 4], nats, targets, data)
    folder.mkdir(parents=True)
    write_document_losses(folder, losses)
    metrics = MetricsFile(folder)
    metrics.write(9, {"val/loss": sum(losses.nats) / sum(targets)})
    write_report(folder, build_report(folder, "finished", {"watched_metric": "val/loss", "data": {"hash": data}}))
    return losses


def _demo(folder: Path) -> str:
    return "\n".join(demo_results.comparison(folder))


def _sweep(folder: Path) -> str:
    jobs = [
        Job(n, [f"x={name}"], folder / name, "finished", watched=read_report(folder / name)["val_loss"])
        for n, name in enumerate(("distilled", "scratch"))
    ]
    return sweep_html.render("sweep", results.collect_results(folder, jobs)) + results.format_results(folder, jobs)


def _study(folder: Path) -> str:
    arms = []
    for name, learns_by in (("scratch", CE), ("distilled", KD)):
        losses, documents = read_report(folder / name)["val_loss"], read_document_losses(folder / name)
        assert documents is not None
        arms.append(arm_result(Arm(SCRATCH, learns_by), TOKENS, 9, {1: losses}, 1.0, {1: documents}))
    results = StudyResults([1], "teacher", None, [], arms, contrasts(arms), [])
    return study_table.format_study(results) + study_html.render("study", results)


@pytest.mark.parametrize("page", [_demo, _sweep, _study], ids=["demo", "sweep", "study"])
def test_two_runs_are_paired_by_document_on_the_same_data_only(tmp_path: Path, page: Callable[[Path], str]) -> None:
    distilled, scratch = _stored(tmp_path / "same/distilled", -0.3), _stored(tmp_path / "same/scratch", 0.0)
    apart = torch.tensor(distilled.nats) - torch.tensor(scratch.nats)
    found = loss_difference(distilled, scratch)
    assert found is not None
    assert found.standard_error == pytest.approx(
        jackknife(apart, [0, 1, 2, 3, 4], torch.tensor(scratch.targets)), rel=1e-3
    )
    ends = sorted(abs(end) for end in (found.low, found.high))
    message = page(tmp_path / "same")
    assert any(f"{end:.4f}" in message for end in ends)
    assert f"{distilled.standard_error:.3f}"[:5] in message or page is _demo
    _stored(tmp_path / "other/distilled", -0.3)
    _stored(tmp_path / "other/scratch", 0.0, data="def")
    assert not any(f"{end:.4f}" in page(tmp_path / "other") for end in ends)
