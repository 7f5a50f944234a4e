"""Pairs: content and order of their batches; how they are split, truncated to the context and cached."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules import pair_preparation
from datamodules.pair_preparation import read_pairs
from datamodules.pairs import PairData
from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.data.tokenizer import load_tokenizer, tokenizer_hash
from gpt2lab.errors import InputError
from gpt2lab.model.attention_masks import causal_spans, spans_to_position_ids
from gpt2lab.settings import ObjectiveSettings, TokenizerChoice
from gpt2lab.storage.damaged_files import warn_once
from tests.conftest import ROOT

LICENCE = ROOT / "LICENSE"


@pytest.fixture(scope="session")
def words() -> list[str]:
    """Real English text: the words of this project's licence."""
    return LICENCE.read_text(encoding="utf-8").split()


@pytest.fixture
def pairs_file(tmp_path, words) -> Path:
    """120 pairs of 3 to 40 words → 1 to 7 words; every tenth source text occurs twice, with another target."""
    lines = []
    for number in range(120):
        first = (number - (number % 10 == 1)) * 11  # number 11, 21, … repeats the source before it
        source, target = words[first : first + 3 + first % 37], words[number * 11 + 40 :][: 1 + number % 7]
        lines.append(json.dumps({"source": " ".join(source), "target": " ".join(target)}))
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(lines))
    return file


class Place:
    """What a data module reads from its trainer: rank, number of ranks, optimizer step and device; no overfitting."""

    def __init__(self, rank: int, world: int, step: int = 0) -> None:
        self.global_rank, self.world_size, self.global_step = rank, world, step
        self.overfit_batches = 0
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"))


def make(path: Path | str, cache: Path, changed: dict[str, object] | None = None) -> PairData:
    arguments = {
        "name": "pairs",
        "prompt": "{source}\n\nTL;DR:",
        "response": " {target}",
        "source": "source",
        "target": "target",
        "path": str(path),
        "tokenizer": TokenizerChoice("bpe", 300),
        "context": 512,
        "batch_sequences": 12,
        "accumulate": 1,
        "seed": 7,
        "cache_dir": str(cache),
        "val_fraction": 0.2,
        "eval_batch_sequences": 5,
    }
    return PairData(**{**arguments, **(changed or {})})


@pytest.fixture
def data(pairs_file, tmp_path) -> PairData:
    module = make(pairs_file, tmp_path / "cache")
    module.prepare()
    return module


def texts_of(data: PairData, batch: Batch) -> list[tuple[str, str]]:
    """Return (prompt, response without end-of-text) of each row, from input ids and labels."""
    tokenizer = load_tokenizer(data.prepare().tokenizer_folder)
    rows = []
    for ids, labels, length in zip(batch.input_ids, batch.labels, batch.prompt_lengths.tolist(), strict=True):
        response = labels[labels != IGNORE_INDEX].tolist()
        assert response[-1] == tokenizer.eos_token_id
        rows.append((tokenizer.decode(ids[:length]), tokenizer.decode(response[:-1])))
    return rows


def test_labels_are_exactly_the_response_and_end_of_text(data):
    tokenizer = load_tokenizer(data.prepare().tokenizer_folder)
    given = set(read_pairs(next((data.cache_dir / "pairs").glob("pairs-*[!k]"))))
    for batch in data.val_dataloader():
        for row, reference in enumerate(batch.references):
            length = int(batch.prompt_lengths[row])
            response = [*tokenizer.encode(" " + reference), tokenizer.eos_token_id]
            expected = torch.full_like(batch.labels[row], IGNORE_INDEX)
            expected[length - 1 : length - 1 + len(response)] = torch.tensor(response)
            assert torch.equal(batch.labels[row], expected)
            # Inputs are the labels shifted by one position; padding is end-of-text.
            assert torch.equal(batch.input_ids[row, length : length + len(response) - 1], torch.tensor(response[:-1]))
            assert (batch.input_ids[row, length + len(response) - 1 :] == tokenizer.eos_token_id).all()
            source = tokenizer.decode(batch.input_ids[row, :length]).removesuffix("\n\nTL;DR:")
            assert (source, reference) in given


def test_micro_batch_is_padded_to_its_longest_multiple_of_eight(data):
    stream = iter(data.train_dataloader())
    lengths = set()
    for _ in range(6):
        batch = next(stream)
        longest = max(int((row != IGNORE_INDEX).nonzero()[-1]) + 1 for row in batch.labels)
        assert batch.input_ids.shape == batch.labels.shape == (12, -(-longest // 8) * 8)
        lengths.add(batch.input_ids.shape[1])
    assert len(lengths) > 1


@pytest.mark.parametrize("name", ["clm", "prefix_lm"])
def test_training_pairs_share_rows_and_validation_pairs_do_not(name, pairs_file, tmp_path):
    """The targets are the same; a validation pair has a separate row, because a model generates from its prompt."""
    batches = {}
    for packing in (True, False):
        data = make(pairs_file, tmp_path / "cache", {"packing": packing, "objective": ObjectiveSettings(name)})
        data.prepare()
        batches[packing] = next(iter(data.train_dataloader()))
        for batch in data.val_dataloader():
            assert len(batch.input_ids) == len(batch.indices)
            assert (batch.spans is None) == (name == "clm")
    packed, apart = batches[True], batches[False]
    assert len(packed.input_ids) < len(apart.input_ids) == len(apart.indices)
    assert sorted(packed.indices.tolist()) == sorted(apart.indices.tolist())
    targets = [batch.labels[batch.labels != IGNORE_INDEX].sort().values for batch in (packed, apart)]
    assert torch.equal(*targets)
    # Under prefix_lm a prompt's first token sees all of the prompt but its last.
    for batch in batches.values():
        spans = batch.spans if batch.spans is not None else causal_spans(batch.input_ids)
        seen = (spans[..., 1] - spans[..., 0])[
            (spans_to_position_ids(spans) == 0) & (batch.input_ids != data.train_samples.pad_id)
        ]
        lengths = batch.prompt_lengths - 1 if name == "prefix_lm" else torch.ones_like(batch.prompt_lengths)
        assert sorted(seen.tolist()) == sorted(lengths.tolist())


def test_negatives_are_sampled_by_training_target_counts(data):
    """Each pair counts once, independent of the prompts."""
    batch = data.train_samples.batch(np.arange(len(data.train_samples)), 0)
    expected = torch.bincount(batch.labels[batch.labels != IGNORE_INDEX], minlength=300)
    assert data.token_counts().tolist() == expected.tolist()


def test_padding_never_exceeds_the_context(pairs_file, tmp_path):
    data = make(pairs_file, tmp_path / "cache", {"context": 50})
    data.prepare()
    shapes = {
        next(iter(data.train_dataloader())).input_ids.shape[1],
        *(b.input_ids.shape[1] for b in data.val_dataloader()),
    }
    assert max(shapes) == 50


def test_no_source_is_on_both_sides_and_no_pair_is_lost(data, pairs_file):
    sides = [
        [pair for batch in loader for pair in texts_of(data, batch)]
        for loader in (data.train_eval_dataloader(), data.val_dataloader())
    ]
    assert not {source for source, _ in sides[0]} & {source for source, _ in sides[1]}
    given = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    assert sorted(sides[0] + sides[1]) == sorted((p["source"] + "\n\nTL;DR:", " " + p["target"]) for p in given)
    assert 0 < len(sides[1]) < len(sides[0])


def test_the_split_does_not_depend_on_the_seed(pairs_file, tmp_path):
    first, second = (make(pairs_file, tmp_path / "cache", {"seed": seed}) for seed in (1, 2))
    assert first.prepare() == second.prepare()
    assert not torch.equal(next(iter(first.train_dataloader())).indices, next(iter(second.train_dataloader())).indices)


@pytest.mark.parametrize("val_fraction", [1e-9, 1 - 1e-9])
def test_each_side_gets_a_pair_even_of_two(tmp_path, val_fraction):
    file = tmp_path / "two.jsonl"
    file.write_text('{"source": "one", "target": "eins"}\n{"source": "two", "target": "zwei"}\n')
    data = make(file, tmp_path / "cache", {"val_fraction": val_fraction})
    data.prepare()
    assert len(data.train_samples) == len(data.val_samples) == 1


def test_pairs_of_the_validation_file_are_not_trained_on(pairs_file, tmp_path):
    given = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    val_file = tmp_path / "val.jsonl"
    val_file.write_text("\n".join(json.dumps(pair) for pair in given[:4]))
    data = make(pairs_file, tmp_path / "cache", {"val_path": str(val_file)})
    data.prepare()
    assert len(data.val_samples) == 4
    held_out = {pair["source"] for pair in given[:4]}
    assert len(data.train_samples) == sum(pair["source"] not in held_out for pair in given)


def test_long_pairs_lose_only_the_end_of_their_source(data, pairs_file, tmp_path):
    context = 80
    short = make(pairs_file, tmp_path / "cache", {"context": context})
    short.prepare()
    whole = dict(enumerate(pair for batch in data.train_eval_dataloader() for pair in texts_of(data, batch)))
    shortened = 0
    for batch in short.train_eval_dataloader():
        for row, (prompt, response), index in zip(
            batch.labels, texts_of(short, batch), batch.indices.tolist(), strict=True
        ):
            full_prompt, full_response = whole[index]
            assert response == full_response
            assert prompt.endswith("\n\nTL;DR:")
            assert full_prompt.startswith(prompt.removesuffix("\n\nTL;DR:"))
            if prompt != full_prompt:
                shortened += 1
                # No token more than necessary is cut, but a cut word may have fewer tokens.
                assert int((row != IGNORE_INDEX).nonzero()[-1]) + 1 >= context - 3
    assert shortened > 10


def test_pair_with_too_long_a_target_is_skipped_with_a_warning(tmp_path, words, caplog):
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"source": " ".join(words[i : i + 5]), "target": " ".join(words[:200] if i == 30 else words[:2])}
        for i in range(60)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    data = make(file, tmp_path / "cache", {"context": 100})
    data.prepare()
    assert len(data.train_samples) + len(data.val_samples) == 59
    assert caplog.text.count("1 are skipped (target too long)") == 1
    data.prepare()
    assert caplog.text.count("1 are skipped (target too long)") == 1
    warn_once.cache_clear()  # as in another process, where everything is prepared
    make(file, tmp_path / "cache", {"context": 100}).prepare()
    assert caplog.text.count("1 are skipped (target too long)") == 2


@pytest.mark.parametrize(
    "text", ["{source} {target} {}", "a {0} b {{x}}", "%s <|endoftext|> \\n {", "naïve 日本語 🙂\u2028x\x0c"]
)
def test_template_preserves_braces_and_all_characters(tmp_path, text):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"source": f"{text}{n}", "target": f"{text}!{n}"}) for n in range(8)))
    data = make(file, tmp_path / "cache", {"prompt": "Q: {source} A:", "response": "{target}."})
    data.prepare()
    found = {pair for batch in data.train_eval_dataloader() for pair in texts_of(data, batch)}
    found |= {pair for batch in data.val_dataloader() for pair in texts_of(data, batch)}
    assert found == {(f"Q: {text}{n} A:", f"{text}!{n}.") for n in range(8)}
    references = [reference for batch in data.val_dataloader() for reference in batch.references]
    assert set(references) <= {f"{text}!{n}" for n in range(8)}


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2)])
def test_global_batch_does_not_depend_on_ranks_and_accumulation(data, pairs_file, world, accumulate):
    whole = itertools.islice(data.train_dataloader(), 20)  # 240 pairs: more than two epochs
    ranks = []
    for rank in range(world):
        part = make(pairs_file, data.cache_dir, {"accumulate": accumulate})
        part.trainer = Place(rank, world)
        part.prepare()
        ranks.append(iter(part.train_dataloader()))
    for expected in whole:
        parts = [next(stream) for _ in range(accumulate) for stream in ranks]
        assert torch.equal(torch.cat([part.indices for part in parts]), expected.indices)
        targets = sum(int((part.labels != IGNORE_INDEX).sum()) for part in parts)
        assert {part.target_tokens for part in parts} == {targets} == {expected.target_tokens}


def test_every_epoch_holds_every_pair_once(data):
    size = len(data.train_samples)
    stream = (index for batch in data.train_dataloader() for index in batch.indices.tolist())
    for _ in range(3):
        assert sorted(itertools.islice(stream, size)) == list(range(size))


@pytest.mark.parametrize("workers", [0, 2])
def test_first_batch_after_a_resume_is_that_of_its_step(data, pairs_file, workers):
    expected = next(itertools.islice(data.train_dataloader(), 17, None))
    later = make(pairs_file, data.cache_dir, {"workers": workers})
    later.trainer = Place(0, 1, step=17)
    later.prepare()
    batch = next(iter(later.train_dataloader()))
    assert torch.equal(batch.input_ids, expected.input_ids)
    assert torch.equal(batch.labels, expected.labels)


@pytest.mark.parametrize("world", [2, 4, 5])
def test_ranks_validate_every_pair_once_in_equally_many_batches(data, pairs_file, world):
    seen, batches = [], set()
    for rank in range(world):
        part = make(pairs_file, data.cache_dir)
        part.trainer = Place(rank, world)
        part.prepare()
        mine = list(part.val_dataloader())
        batches.add(len(mine))
        for batch in mine:
            assert batch.target_tokens == int((batch.labels != IGNORE_INDEX).sum())
            assert len(batch.references) == len(batch.indices) == len(batch.prompt_lengths)
            assert len(batch.input_ids) > 0
            seen += batch.indices.tolist()
    assert sorted(seen) == list(range(len(data.val_samples)))
    assert len(batches) == 1


def test_facts_equal_the_counts_of_the_batches(data):
    facts = data.prepare()
    batches = list(data.val_dataloader())
    assert facts.val_tokens == sum(batch.target_tokens for batch in batches)
    assert facts.val_bytes == sum(len(f" {text}".encode()) for batch in batches for text in batch.references)
    assert facts.train_tokens == sum(batch.target_tokens for batch in data.train_eval_dataloader())


def test_a_second_preparation_reads_the_cache(data, pairs_file, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("prepared twice")

    monkeypatch.setattr(pair_preparation, "encode_pairs", refuse)
    monkeypatch.setattr(pair_preparation, "pair_text", refuse)
    again = make(pairs_file, data.cache_dir)
    assert again.prepare() == data.prepare()


@pytest.mark.parametrize("change", ["bytes", "template", "context", "columns", "tokenizer"])
def test_any_change_of_the_tokens_changes_the_hash(data, pairs_file, change):
    changed = {
        "bytes": {},
        "template": {"prompt": "{source} ="},
        "context": {"context": 40},
        "columns": {"source": "target", "target": "source"},
        "tokenizer": {"tokenizer": TokenizerChoice("bpe", 310)},
    }[change]
    before = data.prepare().hash
    if change == "bytes":
        pairs_file.write_text(pairs_file.read_text() + '\n{"source": "one more", "target": "pair"}')
    assert make(pairs_file, data.cache_dir, changed).prepare().hash != before


def test_a_given_tokenizer_is_used_as_it_is(data, pairs_file, tmp_path):
    folder = data.prepare().tokenizer_folder
    given = make(pairs_file, tmp_path / "cache2", {"tokenizer": TokenizerChoice("pretrained", source=folder)})
    assert tokenizer_hash(load_tokenizer(given.prepare().tokenizer_folder)) == tokenizer_hash(load_tokenizer(folder))
    assert given.prepare().vocab_size == 300


def test_micro_batches_without_a_pair_are_refused(pairs_file, tmp_path):
    data = make(pairs_file, tmp_path / "cache", {"batch_sequences": 3, "accumulate": 4})
    data.prepare()
    with pytest.raises(InputError, match="batch_sequences=3 is less than one pair"):
        data.train_dataloader()
