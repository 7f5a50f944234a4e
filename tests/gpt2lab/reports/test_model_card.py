"""Model card: metadata that huggingface_hub reads back, and nothing in it that is not known."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from gpt2lab.data.pair_template import PairTemplate
from gpt2lab.data.tokenizer import load_tokenizer, train_bpe
from gpt2lab.reports.lineage import Ancestor, ancestors_of, read_ancestor
from gpt2lab.reports.model_card import model_card, read_step, without_local_paths
from gpt2lab.reports.report_html import RunFiles, render
from launch.run.card_facts import recipe
from tests.conftest import Train
from tests.support.configurations import composed, prepared, resolved

FACTS: dict[str, Any] = {
    "title": "tiny",
    "task": "pretrain",
    "parameters": 1_000_000,
    "steps": 400,
    "tokens_seen": 4_000_000,
    "data": {"name": "stdlib", "hash": "0123456789abcdef", "tokens": 3_000_000, "val_overlap": 0.1},
    "languages": ["code", "en"],
    "metrics": {"val/loss": 2.0, "val/perplexity": 7.389, "val/bits_per_byte": 1.0, "benchmarks/x/acc": 0.25},
    "val_loss_error": 0.05,
    "val_tokens": 1000,
    "val_documents": 12,
    "full_val_loss": 2.1,
    "full_val_loss_error": 0.01,
    "full_val_tokens": 5000,
    "recipe": {"optimizer": "muon"},
    "command": "python train.py model=nano",
}
GPT2 = Ancestor("initial weights", "openai/gpt2", "openai/gpt2", metadata={"license": "mit", "language": "en"})
LOCAL = Ancestor("initial weights", "run", metadata={"language": ["de", "code"]}, ancestors=(GPT2,))
TEACHER = Ancestor("teacher", "user/big", "user/big", metadata={"license": "apache-2.0", "language": ["fr"]})
HUB_DATA = [{"id": "ORG/NAME", "config": "en", "split": "train", "revision": "abc"}]
# facts → metadata that they give; None: the field is left out
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "local data": ({}, {"datasets": None, "license": None, "base_model": None, "language": ["code", "en"]}),
    "own text": ({"languages": []}, {"language": None}),
    "Hub data": ({"datasets": HUB_DATA}, {"datasets": ["ORG/NAME"]}),
    "license": ({"license": "mit", "ancestors": (TEACHER,)}, {"license": "mit"}),
    "Hub weights": (
        {"ancestors": (GPT2,), "languages": ["de_AT"]},
        {"base_model": "openai/gpt2", "base_model_relation": "finetune", "license": "mit", "language": ["de", "en"]},
    ),
    "local weights": (
        {"ancestors": (LOCAL,), "languages": []},
        {"base_model": "openai/gpt2", "license": "mit", "language": ["de", "code", "en"]},
    ),
    "teacher only": (
        {"ancestors": (TEACHER,), "task": "distill", "init": {"source": "scratch"}},
        {"base_model": None, "base_model_relation": None, "license": None, "language": ["code", "en"]},
    ),
    "teacher layers": (
        {"ancestors": (TEACHER,), "task": "distill", "init": {"source": "teacher_layers"}},
        {"base_model": "user/big", "base_model_relation": None, "license": "apache-2.0"},
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(iter([Path(json.__file__).read_text()]), 300).save_pretrained(folder)
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("name", CASES)
def test_metadata_states_what_is_known_and_no_more(name: str, tokenizer: Any) -> None:
    facts, expected = CASES[name]
    card = ModelCard(model_card({**FACTS, **facts}, "clm", tokenizer, None))
    assert {key: card.data.get(key) for key in expected} == expected
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert ("No license is stated" in card.text) == (card.data.license is None)


def test_scores_are_in_the_index_and_their_errors_in_the_text(tokenizer: Any) -> None:
    for datasets in ([], HUB_DATA):
        card = ModelCard(model_card({**FACTS, "datasets": datasets}, "clm", tokenizer, None))
        index = {(one.metric_type, one.metric_name): one for one in card.data.eval_results}
        assert [one.metric_value for one in index.values()] == [2.0, 7.389, 1.0, 2.1, 0.25]
        loss, *_, benchmark = index.values()
        assert loss.dataset_type == ("ORG/NAME" if datasets else "unknown")
        assert "hash 0123456789abcdef" in loss.dataset_name
        assert (benchmark.dataset_type, benchmark.dataset_name) == ("unknown", "x (lm-evaluation-harness)")
        for row in ("| 2 | ± 0.050 |", "| 7.389 | ± 0.37 |", "| 1 | ± 0.025 |", "| 2.1 | ± 0.010 | 5,000 tokens"):
            assert row in card.text


def test_card_without_facts_is_valid_and_claims_nothing(tokenizer: Any) -> None:
    card = ModelCard(model_card({}, "mlm", tokenizer, None))
    assert card.data.pipeline_tag == "fill-mask"
    assert card.data.eval_results is None
    assert [line for line in card.text.splitlines() if line.startswith("## ")] == ["## Use"]


def test_limitations_follow_from_the_facts(tokenizer: Any) -> None:
    text = model_card({**FACTS, "ancestors": (TEACHER,), "n_positions": 64}, "clm", tokenizer, None)
    for limit in ("4.00 target tokens for each", "at most 64 tokens", "stdlib (code, en)", "10.0% of its 13-grams"):
        assert limit in text
    assert "12 groups of documents only" in text
    assert "imitate its teacher" in text
    assert "fewer than the 20" in model_card(FACTS, "clm", tokenizer, None)
    pairs = model_card(FACTS, "clm", tokenizer, PairTemplate("{source}\n", "{target}"))
    assert "answers prompts of the template" in pairs
    assert "attention mask hides the padding" in pairs


def test_lineage_is_read_through_the_reports_of_all_ancestors(tmp_path: Path, tokenizer: Any) -> None:
    names = {"big": {}, "small": {"teacher": "big"}, "tuned": {"init": "small"}}
    for name, sources in names.items():
        (tmp_path / name / "hf").mkdir(parents=True)
        nodes = {key: {"source": str(tmp_path / source / "hf")} for key, source in sources.items()}
        report = {"task": "pretrain", "val_loss": 2.5, "data": FACTS["data"], **nodes}
        report |= {"hub": {"repository": "user/small"}} if name == "small" else {}
        (tmp_path / name / "report.json").write_text(json.dumps(report))
        (tmp_path / name / "hf" / "README.md").write_text("---\nlanguage: en\n---\n")
    tuned = read_ancestor("initial weights", str(tmp_path / "tuned" / "hf"))
    assert [one.name for one in tuned.ancestors] == ["user/small"]
    assert [(one.role, one.name) for one in tuned.ancestors[0].ancestors] == [("teacher", "big")]
    text = model_card({**FACTS, "ancestors": (tuned,)}, "clm", tokenizer, None)
    assert "base_model: user/small" in text
    lines = [line for line in text.splitlines() if "validation loss 2.500" in line]
    assert [len(line) - len(line.lstrip()) for line in lines] == [2, 4, 6]
    assert str(tmp_path) not in text


def test_lineage_with_a_circle_or_damage_ends(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        report = {"init": {"source": str(tmp_path / other)}, "teacher": {"source": 5}}
        (tmp_path / name / "report.json").write_text(json.dumps(report))
        (tmp_path / name / "README.md").write_text("---\na: [\n---\n")
    assert read_ancestor("initial weights", str(tmp_path / "a")).metadata == {}
    assert ancestors_of({"init": {"source": "scratch"}}) == ()


PATHS = {  # word of a command → word of the card
    f"teacher={Path.cwd()}/runs/a": "teacher=runs/a",
    "path=/home/me/x/notes,/data/y": "path=.../notes,.../y",
    "path='/home/me/*.py'": "path='.../*.py'",
    "callbacks.x.files=[/home/me/a,/home/me/b]": "callbacks.x.files=[.../a,.../b]",
    "prompt=a /b c": "prompt=a /b c",
    "/home/me/train.py": ".../train.py",
    "path=/": "path=/",
    "https://x/y": "https://x/y",
}


@pytest.mark.parametrize("word", PATHS)
def test_card_names_no_path_of_the_machine(word: str) -> None:
    assert without_local_paths(shlex.join(["python", word])) == shlex.join(["python", PATHS[word]])


RECIPES = {
    "on-policy": (["task=distill", "sequences=gkd", "sequences.lmbda=0.25"], "the student's own text in 25% of the"),
    "off-policy": (["task=distill"], "data: the data, unchanged"),
    "teacher's text": (["task=distill", "sequences=seqkd"], "text that the teacher generated once"),
    "trained tokenizer": (["data=stdlib"], "bpe, trained on the training split"),
    "tokenizer of the Hub": (["tokenizer=hub", "tokenizer.source=org/name"], "that of org/name"),
    "tokenizer of a run": (["tokenizer=hub", "tokenizer.source=/x/runs/a/hf"], "that of a"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_names_the_origin_of_text_and_tokenizer(name: str) -> None:
    words, expected = RECIPES[name]
    spec = prepared(resolved(composed("teacher=x", *words) if "task=distill" in words else composed(*words)))
    assert any(expected in value for value in recipe(spec).values()), recipe(spec)


def test_card_without_validation_claims_nothing_of_scores(tokenizer: Any) -> None:
    text = model_card({**FACTS, "metrics": {}, "full_val_loss": None}, "clm", tokenizer, None)
    assert "It was not validated" in text
    assert "Scores on the validation split" not in text


def test_continued_run_states_its_other_length(tokenizer: Any) -> None:
    facts = {**FACTS, "continued_with": ["steps=800"]}
    assert "Continued with `steps=800`." in model_card(facts, "clm", tokenizer, None)
    assert "Continued with <code>steps=800</code>" in render("run", facts, RunFiles())


PRESETS = {
    "stdlib": (["data=stdlib"], ["code", "en"]),
    "own text": (["data=text", "path=/x"], []),
    "given": (["data=text", "path=/x", "data.languages=[de]"], ["de"]),
    "catalogues": (["task=finetune", "data=translate", "data.language=fr"], ["en", "fr"]),
    "other text": (["task=finetune", "data=summarize", "path=/x"], []),
    "Hub": (["data=tinystories"], ["en"]),
    "another set": (["task=finetune", "data=opus100_en_zh", "data.config=de-en"], []),
}


@pytest.mark.parametrize("name", PRESETS)
def test_languages_are_those_of_the_text_that_is_read(name: str) -> None:
    from launch.run.card_facts import stated_languages

    words, expected = PRESETS[name]
    assert stated_languages(composed(*words)) == expected


def test_card_of_a_run_has_its_errors_recipe_and_step(train_here: Train, tiny: list[str], tmp_path: Path) -> None:
    keys = ("steps=4", "validate_every=2", "export=best", "run_dir=run", "callbacks.checkpoint.verify_export=false")
    ended = train_here(*tiny, *keys, "optimizer.lr=0.0123")
    assert ended.code == 0, ended.stderr
    folder = tmp_path / "run" / "hf"
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    card = ModelCard.load(folder / "README.md")
    assert read_step(folder) == report["best_step"]
    assert card.data.eval_results[0].metric_value == pytest.approx(report["val_loss"], rel=1e-5)
    assert report["data"]["hash"] in card.text
    assert "learning rate 0.0123" in card.text
    assert "optimizer.lr=0.0123" in card.text
    assert str(tmp_path) not in card.content


def test_card_of_a_fine_tuned_run_has_its_lineage_and_runs(
    train_here: Train, tiny: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    short = ("callbacks.checkpoint.verify_export=false", "logger=none", "callbacks=minimal", "precision=fp32")
    assert train_here(*tiny, *short, "steps=2", "run_dir=base", "data.languages=[code,en]").code == 0
    rows = [f"value = {number}\tThe value is {number}." for number in range(40)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["source\ttarget", *rows]))
    keys = ("task=finetune", "init=base", "data=pairs", "path=pairs.tsv", "context=32", "batch_sequences=8")
    keys += ("val_fraction=0.3", "task.lora.rank=2", "task.text.max_new_tokens=8", "steps=2", "run_dir=tuned")
    ended = train_here(*keys, *short)
    assert ended.code == 0, ended.stderr
    card = ModelCard.load(tmp_path / "tuned" / "hf" / "README.md")
    base = json.loads((tmp_path / "base" / "report.json").read_text())
    assert card.data.language == ["code", "en"]
    assert "lora" in card.data.tags
    assert "| ROUGE-L | " in card.text
    assert f"- parameters: {base['parameters']:,}\n" in card.text  # adapters are merged
    report = json.loads((tmp_path / "tuned" / "report.json").read_text())
    assert report["metric_errors"].keys() == {"val/rougeL"}
    assert f"initial weights: **base**, pretrained on text (hash `{base['data']['hash']}`)" in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    capfd.readouterr()
    exec(compile(code.replace("path/to/this/folder", str(tmp_path / "tuned" / "hf")), "card", "exec"), {})
    assert len(capfd.readouterr().out.strip().splitlines()) >= 2
