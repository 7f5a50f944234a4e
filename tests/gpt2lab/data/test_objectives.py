"""Objectives: attention masks, targets, and random choices that depend on a seed alone."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from datamodules.micro_batches import TrainingStream
from gpt2lab.data.batch import IGNORE_INDEX, Batch, PairTokens, pack_pairs, pad_pairs
from gpt2lab.data.fim import make_fim_prompt
from gpt2lab.data.objectives import Objective
from gpt2lab.data.special_tokens import SpecialTokens, find_special_tokens
from gpt2lab.data.token_file import TokenFile, token_dtype
from gpt2lab.data.tokenizer import TextEncoder, train_bpe
from gpt2lab.data.windows import Windows
from gpt2lab.losses.lm_head_loss import lm_head_loss
from gpt2lab.losses.sampled_softmax import NegativeSampler, log_uniform, sampled_softmax_loss, unigram
from gpt2lab.model.attention_masks import document_bounds, format_mask, make_spans, spans_to_mask
from gpt2lab.model.backbone import Backbone, load_backbone, to_hf
from gpt2lab.settings import ModelShape, ObjectiveSettings

CONTEXT = 24
NAMES = ("clm", "prefix_lm", "mlm", "fim", "sampled_softmax")
IMPLEMENTATIONS = ("sdpa", "eager")  # of GPT-2's attention in transformers without a GPU


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(iter([Path(json.__file__).read_text()]), 400)


@pytest.fixture(scope="module")
def marks(tokenizer: PreTrainedTokenizerFast) -> SpecialTokens:
    return find_special_tokens(tokenizer)


@pytest.fixture(scope="module")
def file(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    """Short documents, so that a window has several; the last window is short."""
    text = Path(json.__file__).read_text()
    documents = TextEncoder(tokenizer)([text[start : start + 37] for start in range(0, 4000, 37)])
    ids = [token for document in documents for token in (tokenizer.eos_token_id, *document)]
    ids = ids[: len(ids) // CONTEXT * CONTEXT + CONTEXT // 2]
    path = tmp_path_factory.mktemp("tokens") / "train.bin"
    np.array(ids, token_dtype(len(tokenizer))).tofile(path)
    return TokenFile(path, token_dtype(len(tokenizer)), CONTEXT, keep_short=True)


def windows(file: TokenFile, marks: SpecialTokens, name: str, *, separate: bool = False, seed: int = 1) -> Windows:
    return Windows(
        file, Objective(ObjectiveSettings(name), marks, end_of_text=marks.end_of_text if separate else None, seed=seed)
    )


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Backbone:
    """Random weights, large enough that every attended token changes the logits."""
    torch.manual_seed(0)
    backbone = Backbone(ModelShape(2, 2, 32, CONTEXT, len(tokenizer))).double().eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(4)
    return backbone


# Attention masks


def may_look(
    name: str, separate: bool, file: TokenFile, rows: np.ndarray, batch: Batch, marks: SpecialTokens
) -> torch.Tensor:
    """Return the mask (B, T, T) by the definition of an objective, from the file's tokens and labels, not spans."""
    original, following = file.read(rows)
    text = batch.input_ids if name == "fim" else original  # the special tokens of fim move the beginnings of documents
    held = (following != IGNORE_INDEX).sum(1)  # (B,) next tokens; the last window is short
    allowed = torch.zeros(len(rows), CONTEXT, CONTEXT, dtype=torch.bool)
    for row in range(len(rows)):
        length = min(int(held[row]) + 1, CONTEXT)
        targets = (batch.labels[row] != IGNORE_INDEX).nonzero()
        source = int(targets[0]) if name == "prefix_lm" else 0  # its last token has the first target
        document = (text[row] == marks.end_of_text).cumsum(0)
        for i in range(CONTEXT):
            for j in range(CONTEXT):
                sees = j <= i or (name == "mlm" and j < length) or j < source
                allowed[row, i, j] = sees and (not separate or document[i] == document[j])
    return allowed


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("separate", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_token_change_affects_only_logits_that_attend_to_it(
    name: str, separate: bool, implementation: str, file: TokenFile, marks: SpecialTokens, model: Backbone
) -> None:
    rows = np.array([3, len(file) - 1])
    batch = windows(file, marks, name, separate=separate).batch(rows, 0)
    spans, length = batch.spans, batch.input_ids.shape[1]
    allowed = may_look(name, separate, file, rows, batch, marks)  # (B, T, T)
    model.lm.set_attn_implementation(implementation)
    before = model.logits(batch.input_ids, spans)
    for place in range(length):
        moved = batch.input_ids.clone()
        moved[:, place] = (moved[:, place] + 7) % model.shape.vocab_size
        change = (model.logits(moved, spans) - before).abs().amax(2)  # (B, T)
        may = allowed[:, :, place]
        assert float(change.masked_fill(may, 0).max()) == 0
        assert float(change.masked_fill(~may, math.inf).min()) > 1e-3
    model.lm.set_attn_implementation("sdpa")


def test_spans_encode_documents_and_prefixes() -> None:
    starts = torch.tensor([[1, 0, 0, 1, 0, 0, 1]]).bool()
    first, end = document_bounds(starts)
    assert first.tolist() == [[0, 0, 0, 3, 3, 3, 6]]
    assert end.tolist() == [[3, 3, 3, 6, 6, 6, 7]]
    assert make_spans(first, end)[0, :, 1].tolist() == [1, 2, 3, 4, 5, 6, 7]
    ahead = torch.tensor([[2, 2, 2, 5, 5, 5, 0]])
    assert make_spans(first, end, ahead)[0, :, 1].tolist() == [2, 2, 3, 5, 5, 6, 7]
    assert make_spans(first, end, 100)[0, :, 1].tolist() == [3, 3, 3, 6, 6, 6, 7]


def test_document_bounds_survive_masked_end_of_text(file: TokenFile, marks: SpecialTokens) -> None:
    rows = np.arange(len(file))
    plain, masked = (windows(file, marks, name, separate=True).batch(rows, 0) for name in ("clm", "mlm"))
    assert bool(((plain.input_ids == marks.end_of_text) & (masked.input_ids != marks.end_of_text)).any())
    assert plain.spans is not None
    assert masked.spans is not None
    assert torch.equal(plain.spans[..., 0], masked.spans[..., 0])


# Targets


@pytest.mark.parametrize("name", NAMES)
def test_target_count_equals_the_count_in_advance(name: str, file: TokenFile, marks: SpecialTokens) -> None:
    samples, rows = windows(file, marks, name), np.arange(len(file))
    for draws in (rows, rows + 10**6):
        counts = samples.target_counts(rows, draws)
        labels = samples.batch(rows, 0, draws).labels
        assert counts.tolist() == (labels != IGNORE_INDEX).sum(1).tolist()
        assert counts.min() > 0


@pytest.mark.parametrize("name", ["prefix_lm", "mlm", "fim"])
def test_random_choices_depend_on_seed_and_key_only(name: str, file: TokenFile, marks: SpecialTokens) -> None:
    samples, rows = windows(file, marks, name), np.array([2, 7, 9])
    together = samples.batch(rows, 0, rows + 100)
    for place, row in enumerate(rows):
        alone = samples.batch(np.array([row]), 0, np.array([row + 100]))
        assert torch.equal(alone.labels[0], together.labels[place])
        assert torch.equal(alone.input_ids[0], together.input_ids[place])
    another_epoch = samples.batch(rows, 0, rows + 200)
    another_seed = windows(file, marks, name, seed=2).batch(rows, 0, rows + 100)
    assert not torch.equal(another_epoch.labels, together.labels)
    assert not torch.equal(another_seed.labels, together.labels)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_and_ranks_share_out_the_same_step(name: str, file: TokenFile, marks: SpecialTokens) -> None:
    samples, size = windows(file, marks, name), 12
    whole = TrainingStream(samples, size, 1, seed=1, rank=0, world=1, first_step=9)[0]
    parts = [
        TrainingStream(samples, size, 2, seed=1, rank=rank, world=2, first_step=5)[8 + part]
        for part in range(2)
        for rank in range(2)
    ]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert {part.target_tokens for part in parts} == {whole.target_tokens}
    assert whole.target_tokens == int((whole.labels != IGNORE_INDEX).sum())


def test_clm_batches_equal_the_token_file(file: TokenFile, marks: SpecialTokens) -> None:
    rows = np.arange(4)
    batch = windows(file, marks, "clm").batch(rows, 5, rows + 3)
    input_ids, labels = file.read(rows)
    assert torch.equal(batch.input_ids, input_ids)
    assert torch.equal(batch.labels, labels)
    assert batch.spans is None


def test_mlm_hides_15_percent_as_bert_does(file: TokenFile, marks: SpecialTokens) -> None:
    rows = np.tile(np.arange(len(file) - 1), 40)
    batch = windows(file, marks, "mlm").batch(rows, 0, np.arange(len(rows)))
    original, _ = file.read(rows)
    chosen = batch.labels != IGNORE_INDEX
    assert chosen.sum(1).unique().tolist() == [round(0.15 * CONTEXT)]
    assert torch.equal(batch.labels[chosen], original[chosen])
    assert torch.equal(batch.input_ids[~chosen], original[~chosen])
    hidden = batch.input_ids[chosen] == marks.mask
    same = batch.input_ids[chosen] == original[chosen]
    assert float(hidden.float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float(same.float().mean()) == pytest.approx(0.1, abs=0.02)  # of 400 random tokens one is the same
    assert chosen.float().mean(0).std() < 0.03, "every place is chosen as often"


def test_prefix_lm_predicts_what_follows_a_prefix_of_any_length(file: TokenFile, marks: SpecialTokens) -> None:
    rows = np.tile(np.arange(len(file) - 1), 40)
    batch = windows(file, marks, "prefix_lm").batch(rows, 0, np.arange(len(rows)))
    _, labels = file.read(rows)
    given = (batch.labels == IGNORE_INDEX).sum(1)  # the last token of the prefix has a target
    assert given.bincount().tolist() == pytest.approx([len(rows) / CONTEXT] * CONTEXT, rel=0.5)
    assert torch.equal(batch.labels[batch.labels != IGNORE_INDEX], labels[batch.labels != IGNORE_INDEX])
    assert batch.spans is not None
    sees = batch.spans[..., 1] - 1  # the last position that each attends to
    targets = batch.labels != IGNORE_INDEX
    assert torch.equal(sees[targets], torch.arange(CONTEXT).expand_as(sees)[targets]), "no target is seen ahead"


def test_fim_moves_middles_and_loses_nothing(file: TokenFile, marks: SpecialTokens) -> None:
    rows = np.arange(len(file) - 1)
    batch = windows(file, marks, "fim").batch(rows, 0, rows)
    original, following = file.read(rows)
    tokens = torch.cat([batch.input_ids, batch.labels[:, -1:]], 1)
    wholes = torch.cat([original, following[:, -1:]], 1)
    found = {"moved": 0, "left": 0, "suffix first": 0}
    for row, whole in zip(tokens.tolist(), wholes.tolist(), strict=True):
        got, expected = split_at(row, marks.end_of_text), split_at(whole, marks.end_of_text)
        for piece, source in list(zip(got, expected, strict=False))[:-1]:  # the last may be truncated
            text = put_back(piece, marks)
            assert text == source
            if len(source) >= 4:
                kind = "left" if text == piece else "suffix first" if follows(piece, marks) else "moved"
                found[kind] += 1
    assert found["left"] == pytest.approx(sum(found.values()) / 2, rel=0.25)
    assert found["suffix first"] == pytest.approx(found["moved"], rel=0.6)


def split_at(tokens: list[int], end_of_text: int) -> list[list[int]]:
    starts = [0, *[place for place, token in enumerate(tokens) if place and token == end_of_text], len(tokens)]
    return [tokens[start:end] for start, end in pairwise(starts)]


def follows(piece: list[int], marks: SpecialTokens) -> bool:
    """Return whether the suffix is written before the prefix."""
    start = piece.index(marks.prefix)
    return piece[start + 1] == marks.suffix and piece.index(marks.middle) > start + 1


def put_back(piece: list[int], marks: SpecialTokens) -> list[int]:
    """Return the document before it was rearranged."""
    if marks.prefix not in piece:
        return piece
    lead, rest = piece[: piece.index(marks.prefix)], piece[piece.index(marks.prefix) + 1 :]
    before, _, after = partition(rest, marks.suffix)
    suffix, _, middle = partition(after, marks.middle)
    return lead + before + middle + suffix


def partition(tokens: list[int], token: int) -> tuple[list[int], int, list[int]]:
    place = tokens.index(token)
    return tokens[:place], token, tokens[place + 1 :]


def test_fim_prompt_has_the_training_format(marks: SpecialTokens) -> None:
    assert make_fim_prompt([5, 6], [7], marks) == [marks.end_of_text, marks.prefix, 5, 6, marks.suffix, 7, marks.middle]


# Sampled softmax


def full_gradient(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    at = hidden.clone().requires_grad_()
    lm_head_loss(at, weight, labels).total.backward()
    assert at.grad is not None
    return at.grad


@pytest.mark.parametrize("distribution", ["log_uniform", "unigram"])
def test_sampled_softmax_follows_the_full_gradient(distribution: str) -> None:
    """The mean over 1,000 samples of 60 of 200 tokens, with the correction and without it."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(16, 8), 0.3 * torch.randn(200, 8)
    labels = torch.randint(0, 200, (16,))
    labels[3] = IGNORE_INDEX
    counts = (1e6 / torch.arange(1, 201) ** 1.5).long()
    probabilities = log_uniform(200) if distribution == "log_uniform" else unigram(counts)
    assert float(probabilities.sum()) == pytest.approx(1)
    sampler = NegativeSampler(probabilities, 60, seed=1)
    expected = full_gradient(hidden, weight, labels)

    def error(log_expected: torch.Tensor) -> float:
        total = torch.zeros_like(hidden)
        for step in range(1000):
            at = hidden.clone().requires_grad_()
            sampled_softmax_loss(at, weight, labels, sampler.sample(step), log_expected).total.backward()
            assert at.grad is not None
            total += at.grad / 1000
        return float((total - expected).norm() / expected.norm())

    assert error(sampler.log_expected) < 0.04
    assert error(torch.zeros(200)) > 0.07


def test_sampled_softmax_of_all_tokens_is_the_full_softmax() -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(16, 8), torch.randn(50, 8), torch.randint(0, 50, (16,))
    everything = sampled_softmax_loss(hidden, weight, labels, torch.arange(50), torch.zeros(50))
    whole = lm_head_loss(hidden, weight, labels)
    torch.testing.assert_close(everything.total, whole.total, rtol=1e-5, atol=1e-5)


def test_negatives_are_different_and_as_frequent_as_expected() -> None:
    sampler = NegativeSampler(log_uniform(100), 20, seed=3)
    drawn = torch.stack([sampler.sample(step) for step in range(4000)])
    assert all(len(row.unique()) == 20 for row in drawn[:100])
    assert torch.equal(sampler.sample(7), drawn[7])
    share = drawn.flatten().bincount(minlength=100) / 4000
    # Expected inclusions are those of independent draws until as many differ: nearly sampling without repetition.
    torch.testing.assert_close(share, sampler.log_expected.exp(), rtol=0.12, atol=0.02)


# Packing


def gradient_of(model: Backbone, batches: list[Batch]) -> torch.Tensor:
    model.zero_grad()
    for batch in batches:
        model(
            batch.input_ids,
            lambda hidden, weight, batch=batch: lm_head_loss(hidden.flatten(0, 1), weight, batch.labels.flatten()),
            batch.spans,
        ).total.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def relative(difference: torch.Tensor, of: torch.Tensor) -> float:
    return float((difference - of).norm() / of.norm())


def test_packed_documents_have_the_gradient_of_separate_ones(
    file: TokenFile, marks: SpecialTokens, model: Backbone
) -> None:
    rows = np.arange(6)
    whole = windows(file, marks, "clm", separate=True).batch(rows, 0)
    leaking = windows(file, marks, "clm").batch(rows, 0)
    apart = []
    for ids, labels in zip(whole.input_ids, whole.labels, strict=True):
        starts = sorted({0, *(ids == marks.end_of_text).nonzero().flatten().tolist()})
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            apart.append(Batch(ids[None, start:end], labels[None, start:end], 0, torch.tensor([0])))
    assert len(apart) > 10
    expected = gradient_of(model, apart)
    assert relative(gradient_of(model, [whole]), expected) < 1e-6
    assert relative(gradient_of(model, [leaking]), expected) > 1e-3


@pytest.mark.parametrize("use_cache", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_an_export_reads_packed_documents_as_the_backbone_does(
    implementation: str, use_cache: bool, file: TokenFile, marks: SpecialTokens, model: Backbone, tmp_path: Path
) -> None:
    """The export receives the mask and positions that restart at each document; with a KV cache also in two pieces."""
    to_hf(model).save_pretrained(tmp_path)
    export = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=implementation, dtype=torch.float64
    ).eval()
    batch = windows(file, marks, "clm", separate=True).batch(np.arange(1, 7), 0)
    ids, spans = batch.input_ids, batch.spans
    assert spans is not None
    assert (ids[:, 1:] == marks.end_of_text).any(1).all(), "several documents in each row"
    expected = load_backbone(str(tmp_path), dtype=torch.float64).eval().logits(ids, spans)
    starts = ids == marks.end_of_text
    document, places = starts.cumsum(1), torch.arange(CONTEXT)
    positions = places - torch.where(starts, places, 0).cummax(1).values
    seen = (document[:, :, None] == document[:, None]) & (places <= places[:, None])  # (B, T, T)
    mask = format_mask(seen[:, None], implementation, torch.float64)
    given = {"attention_mask": mask, "position_ids": positions, "use_cache": use_cache}
    torch.testing.assert_close(export(ids, **given).logits, expected, rtol=0, atol=1e-9)
    # Without a cache transformers separates documents by positions; with one only the mask does.
    arguments = {"neither": {}, "mask": {"attention_mask": mask}, "positions": {"position_ids": positions}}
    for name, part in arguments.items():
        found = export(ids, use_cache=use_cache, **part).logits
        assert (float((found - expected).abs().max()) < 1e-9) == (name == "positions" and not use_cache)
    if use_cache:
        cut = CONTEXT - 9
        first = export(ids[:, :cut], attention_mask=mask[:, :, :cut, :cut], position_ids=positions[:, :cut])
        rest = export(
            ids[:, cut:],
            attention_mask=mask[:, :, cut:],
            position_ids=positions[:, cut:],
            past_key_values=first.past_key_values,
        )
        found = torch.cat([first.logits, rest.logits], 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["clm", "prefix_lm"])
def test_packed_pairs_have_the_gradient_of_separate_ones(bidirectional: bool, model: Backbone) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [
        PairTokens(torch.randint(1, 300, (length,), generator=generator), prompt, number)
        for number, (length, prompt) in enumerate([(9, 4), (5, 2), (14, 10), (25, 20), (6, 5), (12, 1)])
    ]
    given = {"target_tokens": 0, "context": CONTEXT, "pad_id": 0, "bidirectional": bidirectional}
    rows = pack_pairs(pairs, CONTEXT)
    assert len(rows) == 3
    together, apart = pad_pairs(rows, **given), pad_pairs([[pair] for pair in pairs], **given)
    assert sorted(together.indices.tolist()) == list(range(6))
    in_order = [pair.tokens[pair.prompt_length :].tolist() for row in rows for pair in row]
    targets = together.labels[together.labels != IGNORE_INDEX].tolist()
    assert targets == [token for response in in_order for token in response], "targets are in the order of indices"
    assert relative(gradient_of(model, [together]), gradient_of(model, [apart])) < 1e-6
    alone = [pad_pairs([[pair]], **given) for pair in pairs]
    assert relative(gradient_of(model, [together]), gradient_of(model, alone)) < 1e-6
    blind = replace(together, spans=None)
    assert relative(gradient_of(model, [blind]), gradient_of(model, alone)) > 1e-3


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[(4, 3)]], ["110", "110", "111"]),  # the mask treats the last token of its prompt as the first of the target
        ([[(5, 3), (4, 2)]], ["1100000", "1100000", "1110000", "1111000", "0000100", "0000110", "0000111"]),
        ([[(3, 1), (5, 4)]], ["100000", "110000", "001110", "001110", "001110", "001111"]),
    ],
    ids=["alone", "packed", "no prompt to see"],
)
def test_prompts_are_bidirectional_and_pairs_are_isolated(
    rows: list[list[tuple[int, int]]], expected: list[str]
) -> None:
    """Pairs are (number of tokens, of these in the prompt); the last token is a target only."""
    pairs = [[PairTokens(torch.arange(1, size + 1), prompt, 0) for size, prompt in row] for row in rows]
    for bidirectional in (True, False):
        batch = pad_pairs(pairs, target_tokens=0, context=CONTEXT, pad_id=0, bidirectional=bidirectional)
        length = batch.input_ids.shape[1]
        found = torch.ones(length, length).tril().bool() if batch.spans is None else spans_to_mask(batch.spans)[0, 0]
        mask = torch.tensor([[digit == "1" for digit in line] for line in expected])
        size = len(expected)
        assert torch.equal(found[:size, :size], mask if bidirectional else mask.tril())
        assert batch.spans is None or torch.equal(found[size:], torch.eye(length, dtype=torch.bool)[size:])
