"""validate_tokens: a validation reads a fixed sample of the validation split, which depends on the data only."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.language_modeling import LanguageModelingData
from datamodules.micro_batches import SampleDataModule
from datamodules.pairs import PairData
from gpt2lab.data.batch import IGNORE_INDEX
from gpt2lab.data.data_order import validation_rows
from gpt2lab.data.tokenizer import load_tokenizer
from gpt2lab.errors import InputError
from gpt2lab.reports.run_texts import read_examples
from gpt2lab.settings import ObjectiveSettings, TokenizerChoice
from launch.evaluate import eval_data
from tests.conftest import Command, Train
from tests.support.configurations import composed

LIMIT = 800
COMMON: dict[str, Any] = {
    "tokenizer": TokenizerChoice("bpe", vocab_size=300),
    "context": 32,
    "batch_sequences": 4,
    "accumulate": 1,
    "seed": 1,
}


@pytest.fixture(scope="module")
def made(sources: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SampleDataModule]:
    """Prepare running text or pairs, the same files each time, with changed arguments."""
    pairs = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    lines = [line.strip() for file in sorted(sources.glob("*.py")) for line in file.read_text().splitlines()]
    short = [f"{number}\t{line}\n" for number, line in enumerate(lines) if 4 < len(line) < 40 and line.isprintable()]
    pairs.write_text("source\ttarget\n" + "".join(short))

    def make(kind: str, **changes: Any) -> SampleDataModule:
        given = {**COMMON, "cache_dir": str(cache), "val_fraction": 0.3, **changes}
        data: SampleDataModule
        if kind == "text":
            data = LanguageModelingData(name="text", source="text", path=str(sources), **given)
        else:
            columns = {"prompt": "{source}:", "response": " {target}", "source": "source", "target": "target"}
            data = PairData(name="pairs", path=str(pairs), **columns, **given)
        data.facts = data.prepare()  # type: ignore[attr-defined]
        return data

    return make


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_a_validation_reads_a_prefix_that_depends_on_data_only(made: Callable[..., Any], kind: str) -> None:
    part = made(kind, validate_tokens=LIMIT)
    read = part.val_samples.numbered_tokens()[1][part.val_rows].sum()
    longest = part.val_samples.numbered_tokens()[1].max()
    assert LIMIT - longest < read <= LIMIT
    assert not part.validates_all
    for changes in ({"seed": 7}, {"batch_sequences": 9, "accumulate": 3}, {"eval_batch_sequences": 5}, {"workers": 1}):
        assert np.array_equal(made(kind, validate_tokens=LIMIT, **changes).val_rows, part.val_rows)
    larger, whole = made(kind, validate_tokens=LIMIT + 500), made(kind, validate_tokens=10**9)
    assert set(part.val_rows) < set(larger.val_rows) < set(whole.val_rows)
    assert whole.validates_all
    assert np.array_equal(whole.val_rows, made(kind).val_rows)
    assert np.diff(part.val_rows).max() > 2 * np.median(np.diff(part.val_rows)), "spread over the split"
    assert len(made(kind, validate_tokens=1).val_rows) == 1


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_tokens_and_bytes_are_those_that_are_validated(made: Callable[..., Any], kind: str) -> None:
    data, whole = made(kind, validate_tokens=LIMIT), made(kind)
    batches = list(data.val_dataloader())
    assert np.array_equal(np.concatenate([batch.indices.numpy() for batch in batches]), data.val_rows)
    assert [place for batch in batches for place in batch.places.tolist()] == list(range(len(data.val_rows)))
    assert data.facts.val_tokens == sum(batch.target_tokens for batch in batches)
    labels = [row[row != IGNORE_INDEX] for batch in batches for row in batch.labels]
    tokenizer = load_tokenizer(data.facts.tokenizer_folder)
    texts = [tokenizer.decode(row, skip_special_tokens=True).encode(errors="surrogateescape") for row in labels]
    assert data.facts.val_bytes == pytest.approx(sum(map(len, texts)), abs=2 * len(texts)), "characters cut by windows"
    rates = [one.facts.val_bytes / one.facts.val_tokens for one in (data, whole)]
    assert rates[0] == pytest.approx(rates[1], rel=0.2)
    if kind == "text":
        assert data.facts.val_bytes == sum(map(len, texts)), "this text is ASCII"


@pytest.mark.parametrize("objective", ["clm", "mlm", "prefix_lm"])
def test_objectives_validate_on_the_same_windows(made: Callable[..., Any], objective: str) -> None:
    data = made("text", validate_tokens=LIMIT, objective=ObjectiveSettings(objective))
    assert np.array_equal(data.val_rows, made("text", validate_tokens=LIMIT).val_rows)
    assert data.facts.val_tokens == data.val_samples.target_counts(data.val_rows).sum()


def test_leaving_out_samples_keeps_the_order_of_the_rest() -> None:
    numbers, tokens = np.arange(1000), np.random.default_rng(0).integers(1, 50, 1000)
    kept = np.delete(numbers, slice(0, 1000, 7))
    before, after = validation_rows(numbers, tokens, 5000), kept[validation_rows(kept, tokens[kept], 5000)]
    assert set(before) - set(after) <= set(numbers[::7])


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_checkpoints_with_other_tokenizers_score_the_same_text(made: Callable[..., Any], kind: str) -> None:
    def modules() -> list[SampleDataModule]:
        sizes = (300, 340)
        return [made(kind, validate_tokens=LIMIT, tokenizer=TokenizerChoice("bpe", vocab_size=size)) for size in sizes]

    config = composed(f"validate_tokens={LIMIT}")
    compared = modules()
    if kind == "pairs":
        eval_data.keep_common_pairs([data.sides(all_text=False) for data in compared], 32)  # type: ignore[attr-defined]
    eval_data.choose_rows(compared, config, same_text=kind == "pairs")
    numbers = [data.val_samples.numbered_tokens()[0][data.val_rows].tolist() for data in compared]
    if kind == "pairs":
        assert numbers[0] == numbers[1]
        assert not compared[0].validates_all
    else:
        assert all(data.validates_all for data in compared)
        with pytest.raises(InputError, match="validate_tokens=full"):
            eval_data.choose_rows(modules(), config, same_text=False, is_given=True)


def test_evaluate_scores_what_the_run_validated(
    train_here: Train, evaluate_here: Command, tiny: list[str], tmp_path: Path
) -> None:
    words = (*tiny, "steps=4", "threads=1", f"validate_tokens={LIMIT}", "run_dir=run")
    assert train_here(*words).code == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert LIMIT - 32 < report["val_tokens"] <= LIMIT

    def scores(*given: str) -> dict[str, Any]:
        done = evaluate_here("checkpoint=run", "json=scores.json", *given)
        assert done.code == 0, done.stderr
        return dict(json.loads((tmp_path / "scores.json").read_text()))

    own = scores()
    assert own["tokens"] == report["val_tokens"]
    assert own["loss"] == pytest.approx(report["val_loss"], abs=1e-5)
    assert own["bits_per_byte"] == pytest.approx(report["bits_per_byte"], rel=1e-5)
    assert scores("validate_tokens=640")["tokens"] == 640
    assert scores("stride=8", "validate_tokens=640")["tokens"] == pytest.approx(640, abs=32)
    assert scores("validate_tokens=full")["tokens"] > 5 * LIMIT
    refused = evaluate_here("checkpoint=run", "split=all", "validate_tokens=640")
    assert refused.code == 2
    assert "Leave one of them out" in refused.stderr


@pytest.mark.slow
def test_generated_text_is_scored_on_validated_pairs(
    train_here: Train, evaluate_here: Command, tiny: list[str], made: Callable[..., Any], tmp_path: Path
) -> None:
    assert train_here(*tiny, "steps=1", "threads=1", "run_dir=start").code == 0
    words = ("task=finetune", "init=start", "data=pairs", f"path={made('pairs').files[0]}", "context=32", "steps=2")
    words += ("val_fraction=0.3", "precision=fp32", "logger=none", "callbacks=minimal", "batch_sequences=8")
    text = ("task.text.metrics=[chrf]", "task.text.examples=6", "task.text.max_new_tokens=8", "threads=1")
    done = train_here(*words, *text, f"validate_tokens={LIMIT}", "run_dir=run")
    assert done.code == 0, done.stderr
    report = json.loads((tmp_path / "run/report.json").read_text())
    examples = read_examples(tmp_path / "run")
    assert [(one.metric, one.score, bool(one.prompt and one.reference)) for one in examples] == [
        ("chrf", None, True)
    ] * 6
    assert "<h2>Validation examples</h2>" in (tmp_path / "run/report.html").read_text()
    scored = evaluate_here(
        "checkpoint=run", "texts=6", "metrics=chrf", "max_new_tokens=8", "seed=1337", "json=out.json"
    )
    assert scored.code == 0, scored.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["tokens"] == report["val_tokens"]
    assert found["texts"]["chrf"]["value"] == pytest.approx(report["metrics"]["val/chrf"], abs=1e-3)


@pytest.mark.parametrize("given", ["0", "-1", "half", "1.5", "true", "null", "full_split"])
def test_other_values_of_validate_tokens_are_refused(train_here: Train, given: str) -> None:
    answer = train_here(f"validate_tokens={given}", "plan=true")
    assert answer.code == 2
    assert "validate_tokens" in answer.stderr
    assert len(answer.stderr.strip().splitlines()) <= 3
