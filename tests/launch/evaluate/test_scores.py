"""evaluate.py on several checkpoints with every metric: one table, its files, and values equal to plain twins."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from gpt2lab.data.tokenizer import load_tokenizer, train_bpe
from gpt2lab.data.windows import SlidingWindows
from gpt2lab.evaluation import bootstrap
from gpt2lab.evaluation.evaluation import (
    BYTES,
    CALIBRATION,
    NATS,
    TOP1,
    TOP5,
    Score,
    paired_difference,
    score_from_sums,
)
from gpt2lab.evaluation.jackknife import TOKENS
from gpt2lab.evaluation.paired_statistics import t_quantile
from gpt2lab.model.backbone import Backbone, load_backbone, to_hf
from gpt2lab.reports.hf_folder import write_hf_folder
from gpt2lab.settings import ModelShape
from tests.conftest import SHRUNK, Command
from tests.support.lm_eval_task import TASK
from tests.support.text_values import text_metrics

TEXT = Path(json.__file__).read_text()
CONTEXT = 32


def write_models(folder: Path, text: str) -> None:
    """Write three tiny models, folders 1 to 3, of which the first two share a tokenizer trained on `text`."""
    for number, entries in enumerate((300, 300, 350), 1):
        tokenizer = train_bpe(iter([text]), entries)
        torch.manual_seed(number)
        shape = ModelShape(n_layer=1, n_head=2, n_embd=16, n_positions=CONTEXT, vocab_size=len(tokenizer))
        backbone = Backbone(shape)
        for parameter in backbone.parameters():
            parameter.data *= 8  # far from uniform, so that documents differ
        write_hf_folder(to_hf(backbone), tokenizer, folder / str(number), {"title": "tiny"})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tiny models: one and two with one tokenizer, three with another; and a text in two parts."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, TEXT)
    (folder / "train.txt").write_text(TEXT)
    (folder / "val.txt").write_text(TEXT[1000:4000])
    pairs = [{"source": f"call {name}", "target": f"{name} was called"} for name in ("open", "close", "read", "write")]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs * 2)))
    held_out = json.dumps({"source": "call it", "target": "it was called"})
    (folder / "val.jsonl").write_text("\n".join([held_out] * 3))
    return folder


@pytest.fixture
def evaluate_here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluate_here: Command) -> Command:
    """evaluate.py in this process, in the folder of the models."""
    monkeypatch.chdir(models)
    monkeypatch.setenv("GPT2LAB_CACHE", str(tmp_path / "cache"))
    return evaluate_here


RUNNING = ["data=text", "path=train.txt", "val_path=val.txt"]
PAIRS = ["data=pairs", "path=pairs.jsonl", "val_path=val.jsonl"]


def logits_of(model: Path, context: int = CONTEXT) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, V) and labels (n,) of the validation text, side by side windows, by a plain loop."""
    backbone, tokenizer = load_backbone(str(model)).eval(), load_tokenizer(str(model))
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(TEXT[1000:4000])["input_ids"]])
    with torch.no_grad():
        parts = [backbone.logits(ids[None, :-1][:, at : at + context])[0] for at in range(0, len(ids) - 1, context)]
    return torch.cat(parts), ids[1:]


def test_accuracy_and_calibration_equal_those_of_plain_logits(evaluate_here, models: Path, tmp_path: Path) -> None:
    done = evaluate_here("checkpoint=1", *RUNNING, f"json={tmp_path / 'scores.json'}")
    assert done.code == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    logits, labels = logits_of(models / "1")
    best = logits.topk(5).indices
    right = (best[:, 0] == labels).double()
    confidence = logits.softmax(1).max(1).values.double()
    bins = (confidence * 15).long().clamp_max(14)
    gaps = [((right - confidence)[bins == number]).sum().abs().item() for number in range(15)]
    assert scores["top1"] == pytest.approx(right.mean().item())
    assert scores["top5"] == pytest.approx((best == labels[:, None]).any(1).double().mean().item())
    assert scores["ece"] == pytest.approx(sum(gaps) / len(labels), abs=1e-6)
    assert 0 < scores["standard_errors"]["loss"] < 1


def test_checkpoints_with_any_tokenizers_share_one_table(evaluate_here, tmp_path: Path) -> None:
    names = {"json": "scores.json", "csv": "scores.csv", "plot": "scores.html"}
    files = [f"{key}={tmp_path / name}" for key, name in names.items()]
    done = evaluate_here("checkpoint=[123]", *RUNNING, *files, "decode=4")
    assert done.code == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [one["source"] for one in scores] == ["1", "2", "3"]
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    for one, row in zip(scores, rows, strict=True):
        assert float(row["loss"]) == one["loss"]
        assert float(row["bits_per_byte_standard_error"]) == one["standard_errors"]["bits_per_byte"]
        assert [speed["batch"] for speed in one["decoding"]] == [1, 16]
        assert min(speed["tokens_per_second"] for speed in one["decoding"]) > 0
        assert f"{one['loss']:.2f}" in done.stdout
    assert scores[0]["tokens"] == scores[1]["tokens"] != scores[2]["tokens"]
    assert scores[1]["loss_minus_first"]["value"] == pytest.approx(scores[1]["loss"] - scores[0]["loss"])
    assert "loss_minus_first" not in scores[2]  # other tokens, in stretches of other bytes
    page = (tmp_path / "scores.html").read_text()
    cells = sum(1 for row in rows for name, cell in row.items() if cell and _is_figure(name))
    assert page.count('class="dot"') == cells
    panel = page[page.index("<h2>loss</h2>") : page.index("<h2>perplexity</h2>")]
    widths = [float(width) for width in re.findall(r'class="span" style="left:[\d.]+%;width:([\d.]+)%"', panel)]
    errors = [one["standard_errors"]["loss"] for one in scores]
    assert min(widths) > 1
    assert widths[1] / widths[0] == pytest.approx(errors[1] / errors[0], abs=0.04 / min(widths[:2]))  # rounded
    shown = [tuple(map(float, pair)) for pair in re.findall(r'title=".*?\((\S+) … (\S+)\)"', panel)]
    spans = [high - low for low, high in shown]
    # Student's t of the 20 stretches of a text that is one document: some weigh less, so 18 degrees of freedom
    assert spans == pytest.approx([2 * t_quantile(18) * error for error in errors], abs=2e-4)


def _is_figure(name: str) -> bool:
    return name not in ("model", "tokens", "bytes") and not name.endswith("_standard_error")


def test_missing_tokenizer_is_refused(evaluate_here) -> None:
    done = evaluate_here("checkpoint=1", *RUNNING, "tokenizer=/nowhere/at/all")
    assert done.code == 2
    assert "/nowhere/at/all" in done.stderr


def test_windows_of_pairs_do_not_slide(evaluate_here) -> None:
    done = evaluate_here("checkpoint=1", *PAIRS, "stride=4")
    assert done.code == 2
    assert "these data are pairs" in done.stderr


def test_pattern_without_a_match_is_refused(evaluate_here) -> None:
    done = evaluate_here("checkpoint=run-*", *RUNNING)
    assert done.code == 2
    assert "checkpoint=run-* matches no folder" in done.stderr


def test_checkpoint_lists_may_have_spaces_and_brackets(evaluate_here, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "1", models / "1[best]")
    shutil.copytree(models / "1", models / "runs[a]" / "b")
    try:
        done = evaluate_here("checkpoint=runs[a]/*", *RUNNING)
        assert done.code == 0, done.stderr
        done = evaluate_here("checkpoint=1[best], 1[best]", *RUNNING)
        assert done.code == 0, done.stderr
        assert done.stdout.count("1[best]") == 6  # each by its name and source, and at the head of its column
        many = evaluate_here(f"checkpoint={','.join([str(models / '1')] * 300)},./none", *RUNNING)
        assert many.code == 2
        assert "checkpoint=./none: there is no such folder" in many.stderr
    finally:
        shutil.rmtree(models / "1[best]")
        shutil.rmtree(models / "runs[a]")


def test_invalid_records_stop_an_evaluation_or_are_skipped(evaluate_here, models: Path, tmp_path: Path) -> None:
    lines = (models / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "[lacks].jsonl").write_text("\n".join([*lines, '{"source": "only"}', *lines]))
    pairs = ["data=pairs", f"path={tmp_path / '[lacks].jsonl'}", "val_path=val.jsonl", "texts=0"]
    done = evaluate_here("checkpoint=1", *pairs)
    assert done.code == 2
    assert "[lacks].jsonl:9: target=target" in done.stderr
    assert "on_bad_line=skip" in done.stderr
    done = evaluate_here("checkpoint=1,2", *pairs, "on_bad_line=skip")
    assert done.code == 0, done.stderr
    assert done.stderr.count("skipped 1 invalid lines") == 1


def test_weights_that_are_not_finite_are_refused(evaluate_here, models: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(models / "1"))
    backbone.lm.transformer.ln_f.bias.data[0] = torch.inf
    write_hf_folder(to_hf(backbone), load_tokenizer(str(models / "1")), tmp_path / "diverged", {"title": "tiny"})
    for words in ("checkpoint=1", f"teacher={tmp_path / 'diverged'}"), (f"checkpoint={tmp_path / 'diverged'}",):
        done = evaluate_here(*words, *RUNNING)
        assert done.code == 2
        assert "diverged: transformer.ln_f.bias has values that are NaN or infinite" in done.stderr


def test_teacher_of_another_tokenizer_is_refused_before_scoring(evaluate_here, monkeypatch) -> None:
    monkeypatch.setattr("launch.evaluate.score_checkpoints._Scorer.score", None)
    done = evaluate_here("checkpoint=1,3", "teacher=2", *RUNNING)
    assert done.code == 2
    assert "Give a teacher trained with the tokenizer of the checkpoint" in done.stderr


def scored(nats: tuple[float, ...], tokens: tuple[int, ...] = (), spelled: tuple[int, ...] = ()) -> Score:
    """A score from one loss sum a document; by default documents of 4 tokens and 9 bytes."""
    none = torch.zeros(len(nats))
    counts = torch.tensor(tokens or [4] * len(nats))
    sums = {TOKENS: counts, TOP1: none, TOP5: none, CALIBRATION: torch.zeros(len(nats), 15)}
    return score_from_sums({**sums, BYTES: torch.tensor(spelled or [9] * len(nats)), NATS: torch.tensor(nats)})


def test_documents_of_other_bytes_are_not_paired() -> None:
    first = scored((8.0, 8.0), spelled=(9, 11))
    same = paired_difference(scored((8.0, 8.0), spelled=(9, 11)), first)
    assert same is not None
    assert (same.value, same.standard_error) == (0, 0)
    assert paired_difference(scored((8.0, 8.0), spelled=(10, 10)), first) is None


def test_other_tokens_of_the_same_bytes_are_paired_by_byte() -> None:
    found = paired_difference(scored((12.0, 8.0), tokens=(5, 3)), scored((10.0, 9.0)))
    assert found is not None
    assert (found.unit, found.value) == ("bits per byte", pytest.approx(1 / math.log(2) / 18))


def test_paired_difference_cancels_shared_difficulty() -> None:
    hard_and_easy = scored((20.0, 4.0, 12.0, 8.0))
    assert hard_and_easy.standard_errors["loss"] > 0.5
    same = paired_difference(scored((22.0, 6.0, 14.0, 10.0)), hard_and_easy)
    assert same is not None
    assert (same.value, same.standard_error) == (0.5, 0)
    found = paired_difference(scored((21.0, 7.0, 13.0, 11.0)), hard_and_easy)  # by 1 or 3 nats of 4 tokens
    assert found is not None
    assert (found.value, found.standard_error) == pytest.approx((0.5, math.sqrt(4 / 3) / 4 / 2))


def test_sliding_windows_give_every_token_more_before_it(evaluate_here, models: Path, tmp_path: Path) -> None:
    done = evaluate_here("checkpoint=1", *RUNNING, "stride=10", f"json={tmp_path / 'scores.json'}")
    assert done.code == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    backbone, tokenizer = load_backbone(str(models / "1")).eval(), load_tokenizer(str(models / "1"))
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(TEXT[1000:4000])["input_ids"]])
    losses, done_until = [], 0
    with torch.no_grad():
        while done_until < len(ids) - 1:
            end = CONTEXT if not done_until else min(done_until + 10, len(ids) - 1)
            logits = backbone.logits(ids[None, end - CONTEXT : end])[0]
            new = end - done_until
            losses.append(functional.cross_entropy(logits[-new:], ids[end - new + 1 : end + 1], reduction="none"))
            done_until = end
    expected = torch.cat(losses)
    assert scores["tokens"] == len(expected) == len(ids) - 1
    assert scores["loss"] == pytest.approx(expected.mean().item(), abs=1e-5)


@pytest.mark.parametrize("length", [2, 9, 33, 34, 60])
@pytest.mark.parametrize("stride", [1, 7, 32])
def test_no_target_is_left_out_or_counted_twice(length: int, stride: int) -> None:
    tokens = torch.arange(length).numpy()
    windows = SlidingWindows(tokens, CONTEXT, stride, batch=2)
    labels = torch.cat([windows[number].labels.flatten() for number in range(len(windows))])
    assert sorted(labels[labels >= 0].tolist()) == list(range(1, length))


def test_pairs_are_scored_together_with_model_free_baselines(evaluate_here, tmp_path: Path) -> None:
    words = ["metrics=rougeL,chrf,placeholders", "texts=2", "max_new_tokens=4"]
    words += [f"{kind}={tmp_path / f'scores.{kind}'}" for kind in ("json", "csv")] + [
        f"plot={tmp_path / 'scores.html'}"
    ]
    done = evaluate_here("checkpoint=1", *PAIRS, *words)
    assert done.code == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert sorted(scores["texts"]) == ["chrf", "placeholders", "rougeL"]
    assert sorted(scores["baselines"]) == ["copy", "first words", "word table"]
    # “call it” against “it was called”: one word of two and of three, whose harmonic mean is 2/5
    assert scores["baselines"]["copy"]["rougeL"]["value"] == pytest.approx(40)
    apart = scores["texts"]["rougeL"]["value"] - 40
    assert scores["texts_minus"]["copy"]["rougeL"]["value"] == pytest.approx(apart)
    assert "ROUGE-L − copy" in done.stdout
    assert "word table" in done.stdout
    assert "ROUGE-L" in done.stdout
    assert f"chrF: {scores['texts']['chrf']['signature']}" in done.stdout
    (row, *_) = csv.DictReader((tmp_path / "scores.csv").open())
    assert row["chrf_signature"] == scores["texts"]["chrf"]["signature"]
    assert "version:" in row["chrf_signature"]
    assert "placeholders: no reference has any" in done.stdout
    assert scores["texts"]["placeholders"]["value"] is None
    assert "placeholders" not in row
    none = evaluate_here("checkpoint=1", *PAIRS, "texts=0", f"json={tmp_path / 'none.json'}")
    assert none.code == 0
    assert "texts" not in json.loads((tmp_path / "none.json").read_text())


def test_each_set_of_texts_is_resampled_once(evaluate_here, monkeypatch, tmp_path: Path) -> None:
    resampled, original = [], bootstrap.resampled_scores

    def counting(names, texts, *arguments, **keywords):
        resampled.append(tuple(texts))
        return original(names, texts, *arguments, **keywords)

    monkeypatch.setattr(bootstrap, "resampled_scores", counting)
    words = ["metrics=rougeL,bleu", "texts=2", "max_new_tokens=4", f"json={tmp_path / 'scores.json'}"]
    done = evaluate_here("checkpoint=1,3", *PAIRS, *words)
    assert done.code == 0, done.stderr
    first, second = json.loads((tmp_path / "scores.json").read_text())
    assert sorted(first["texts_minus"]) == sorted(second["texts_minus"]) == ["copy", "first words", "word table"]
    assert len(resampled) == 3 + 2  # baselines and checkpoints


EXACT = {"model", "tokens", "bytes"}  # counted or named, not estimated


def test_every_estimate_has_a_standard_error(evaluate_here, tmp_path: Path) -> None:
    files = [f"{kind}={tmp_path / f'scores.{kind}'}" for kind in ("json", "csv")]
    for words in (
        ["checkpoint=1", "teacher=2", "baseline=2", *RUNNING, "decode=4"],
        ["checkpoint=1,2", *RUNNING],
        ["checkpoint=1,3", *PAIRS, "metrics=rougeL,bleu,chrf,exact,f1,compiles"],
    ):
        done = evaluate_here(*words, *files)
        assert done.code == 0, done.stderr
        (*rows,) = csv.DictReader((tmp_path / "scores.csv").open())
        for row in rows:
            figures = {name for name in row if not name.endswith(("_standard_error", "_signature"))} - EXACT
            assert {name for name in figures if row[name] and not row[f"{name}_standard_error"]} == set()
        assert len(figures) > 5
    assert "± " in done.stdout


def test_speedup_error_follows_the_acceptance_error(evaluate_here, tmp_path: Path) -> None:
    done = evaluate_here("checkpoint=1", "teacher=2", *RUNNING, f"json={tmp_path / 'scores.json'}")
    assert done.code == 0, done.stderr
    found = json.loads((tmp_path / "scores.json").read_text())
    drafting, error = found["speculative_decoding"], found["standard_errors"]["distill/acceptance"]
    kept, drafts = drafting["acceptance"], drafting["drafts"]
    slope = sum(number * kept ** (number - 1) for number in range(1, drafts + 1))  # of 1 + α + … + α^drafts
    assert drafting["tokens_per_target_call_standard_error"] == pytest.approx(slope * error, rel=0.05)
    per_cost = slope * error / (1 + drafts * drafting["cost_ratio"])
    assert drafting["speedup_standard_error"] == pytest.approx(per_cost, rel=0.05)


def test_pairs_too_long_for_one_tokenizer_are_scored_for_none(evaluate_here, models, tmp_path) -> None:
    words = TEXT.split()
    # Responses of about as many tokens as fit into 32, so that it depends on the tokenizer whether they do
    pairs = [{"source": words[n], "target": " ".join(words[n * 3 : n * 3 + 4 + n % 5])} for n in range(60)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    data = ["data=pairs", "path=pairs.jsonl", f"val_path={tmp_path / 'long.jsonl'}", "metrics=rougeL", "texts=100"]

    def scores(checkpoint: str) -> Any:
        done = evaluate_here(f"checkpoint={checkpoint}", *data, "max_new_tokens=2", f"json={tmp_path / 'scores.json'}")
        assert done.code == 0, done.stderr
        found = json.loads((tmp_path / "scores.json").read_text())
        for one in found if isinstance(found, list) else [found]:
            kept = one["pairs"]["in_all"] - one["pairs"]["left_out"]
            assert f"Scored are {kept} of 60 pairs" in done.stdout
        return found

    alone, (first, third), (other, again) = scores("1"), scores("1,3"), scores("3,1")
    assert first["pairs"]["too_long_for_this"] > third["pairs"]["too_long_for_this"] > 0
    assert first["pairs"]["left_out"] >= first["pairs"]["too_long_for_this"] == alone["pairs"]["left_out"]
    assert third["pairs"]["left_out"] == first["pairs"]["left_out"]
    assert first["bytes"] == third["bytes"]
    for one, same in ((first, again), (third, other)):  # whichever was named first
        assert {name: one[name] for name in ("loss", "texts", "baselines")} == {
            name: same[name] for name in ("loss", "texts", "baselines")
        }
    tokenizers = [load_tokenizer(str(models / name)) for name in ("1", "3")]
    fitting = [
        pair
        for pair in pairs
        if all(
            len(each("\n\n")["input_ids"]) + len(each(pair["target"])["input_ids"]) <= CONTEXT for each in tokenizers
        )
    ]
    copies = text_metrics(["rougeL"], [pair["source"] for pair in fitting], [pair["target"] for pair in fitting])
    assert first["baselines"]["copy"]["rougeL"]["value"] == pytest.approx(copies["rougeL"])


def test_split_all_scores_every_byte_for_any_tokenizer(evaluate_here, tmp_path: Path) -> None:
    done = evaluate_here("checkpoint=[123]", *RUNNING, "split=all", f"json={tmp_path / 'scores.json'}")
    assert done.code == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [one["bytes"] for one in scores] == [len(TEXT.encode()) + 3000] * 3
    assert "Not all score the same bytes" not in done.stdout


def test_checkpoints_scoring_different_targets_are_flagged(evaluate_here, models, tmp_path: Path) -> None:
    shutil.copytree(models / "1", tmp_path / "prefix")
    config = json.loads((tmp_path / "prefix" / "config.json").read_text())
    (tmp_path / "prefix" / "config.json").write_text(json.dumps({**config, "objective": "prefix_lm"}))
    done = evaluate_here(f"checkpoint=1,{tmp_path / 'prefix'}", *RUNNING, f"json={tmp_path / 'scores.json'}")
    assert done.code == 0, done.stderr
    whole, part = [one["bytes"] for one in json.loads((tmp_path / "scores.json").read_text())]
    assert whole == 3000 > part
    assert "Not all score the same bytes" in done.stdout


BODY = "    b = a\n    return b"


@pytest.mark.slow
def test_compiles_is_equal_in_validation_and_evaluate(evaluate_here, train_here, tmp_path: Path) -> None:
    pairs = [{"source": f"def {name}(a):", "target": BODY} for name in TEXT[:2000].split() if name.isidentifier()]
    (tmp_path / "bodies.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    data = ["data=complete", f"path={tmp_path / 'bodies.jsonl'}", "source=source", "target=target"]
    words = [*(key for key in SHRUNK if not key.startswith(("data=", "batch_tokens="))), *data, "init=scratch"]
    words += ["task=finetune", "batch_sequences=16", "task.text.max_new_tokens=24", "task.text.examples=16"]
    done = train_here(*words, "steps=60", "compile=false", "optimizer.lr=1e-2", f"run_dir={tmp_path / 'run'}")
    assert done.code == 0, done.stderr
    rows = csv.DictReader((tmp_path / "run" / "metrics.csv").open())
    (*_, last) = [row["val/compiles"] for row in rows if row.get("val/compiles")]
    assert float(last) > 90
    done = evaluate_here(f"checkpoint={tmp_path / 'run'}", f"json={tmp_path / 'scores.json'}")
    assert done.code == 0, done.stderr
    assert json.loads((tmp_path / "scores.json").read_text())["texts"]["compiles"]["value"] > 90


ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question[:20]}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


def alone(folder: Path, tasks: Path) -> float:
    """The accuracy that lm_eval's own command finds for the Hugging Face folder."""
    words = ["--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--device", "cpu"]
    words += ["--tasks", "tiny_completion", "--include_path", str(tasks), "--output_path", str(tasks / "out")]
    subprocess.run([sys.executable, "-m", "lm_eval", *words], check=True, cwd=tasks, timeout=250)
    (file,) = (tasks / "out").rglob("results*.json")
    return json.loads(file.read_text())["results"]["tiny_completion"]["acc,none"]


@pytest.mark.slow
def test_harness_tasks_from_files_equal_scores_by_hand(
    evaluate_here, models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [
        {"question": TEXT[at : at + 40], "choices": [TEXT[at + 40 : at + 50], "zzzz zzzz"], "answer": 0}
        for at in range(0, 2000, 100)
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "tiny.yaml").write_text(TASK.format(file=tmp_path / "test.jsonl"))
    (tmp_path / "rolling.yaml").write_text(ROLLING.format(file=tmp_path / "test.jsonl"))
    words = ["lm_eval=tiny_completion,tiny_rolling", f"lm_eval_path={tmp_path}", f"json={tmp_path / 'scores.json'}"]
    done = evaluate_here("checkpoint=1,2", *RUNNING, *words)
    assert done.code == 0, done.stderr
    scores, others = [one["zero_shot"] for one in json.loads((tmp_path / "scores.json").read_text())]
    assert scores.keys() == others.keys()
    assert scores != others
    found = scores["tiny_completion/acc"]
    backbone, tokenizer = load_backbone(str(models / "1")).eval(), load_tokenizer(str(models / "1"))

    def likelihood(question: str, choice: str) -> float:
        whole, start = tokenizer(f"{question} {choice}")["input_ids"], len(tokenizer(question)["input_ids"])
        logits = backbone.logits(torch.tensor([whole[:-1]])[:, -CONTEXT:])[0].log_softmax(1)
        chosen = torch.tensor(whole[start:])
        return logits[-len(chosen) :].gather(1, chosen[:, None]).sum().item()

    with torch.no_grad():
        likely = [[likelihood(one["question"], choice) for choice in one["choices"]] for one in questions]
    right = [first > second for first, second in likely]
    assert found["value"] == pytest.approx(sum(right) / len(right))
    assert found["standard_error"] > 0 or sum(right) in (0, 20)
    assert alone(models / "1", tmp_path) == found["value"]
    # The harness has no error of what it weighs by length; a document is 20 characters, so it is that of a mean.
    with torch.no_grad():
        rows = [[tokenizer.eos_token_id, *tokenizer(one["question"][:20])["input_ids"]] for one in questions]
        parts = [backbone.logits(torch.tensor([row[:-1]]))[0].log_softmax(1) for row in rows]
    nats = [-part.gather(1, torch.tensor(row[1:])[:, None]).sum() for part, row in zip(parts, rows, strict=True)]
    bits = torch.stack(nats) / 20 / math.log(2)
    assert scores["tiny_rolling/bits_per_byte"]["value"] == pytest.approx(bits.mean().item(), rel=1e-4)
    assert scores["tiny_rolling/bits_per_byte"]["standard_error"] == pytest.approx(bits.std().item() / 20**0.5, rel=0.1)
    assert scores["tiny_rolling/word_perplexity"]["standard_error"] > 0
    monkeypatch.setattr("launch.evaluate.score_checkpoints._Scorer.score", None)  # reported before any is scored
    unknown = evaluate_here("checkpoint=1", *RUNNING, "lm_eval=tiny_completoin", f"lm_eval_path={tmp_path}")
    assert unknown.code == 2
    assert "no such task" in unknown.stderr
