"""Speculative decoding: the text of the target, faster, with true statistics."""

import random
from collections.abc import Callable

import pytest
import torch
from transformers import GPT2LMHeadModel
from transformers.generation.streamers import BaseStreamer

from gpt2lab.evaluation.acceptance import MOST_DRAFTS
from gpt2lab.generation import speculative
from gpt2lab.generation.sampling import generate_ids
from gpt2lab.generation.speculative import DraftLength, Speculated, accept, speculate, speculative_ids
from gpt2lab.model.backbone import Backbone
from gpt2lab.settings import GREEDY, ModelShape, SamplingSettings

ENTRIES, END = 6, -1
FEW = 800  # texts, enough that a wrong rule shows


def model(layers: int, seed: int, entries: int = ENTRIES) -> GPT2LMHeadModel:
    """Random weights, large enough that distributions are far from uniform and depend on the context."""
    torch.manual_seed(seed)
    backbone = Backbone(ModelShape(layers, 2, 16, 64, entries))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(3)
    return backbone.lm.eval()


@pytest.fixture(scope="module")
def target() -> GPT2LMHeadModel:
    return model(2, seed=0)


@pytest.fixture(scope="module")
def draft() -> GPT2LMHeadModel:
    return model(1, seed=1)


PENALIZED = SamplingSettings("penalized", temperature=0.0, repetition_penalty=1.3, no_repeat_ngram=3)
FILTERED = SamplingSettings("filtered", temperature=0.8, top_k=4, top_p=0.9)
SIZES = {"end_of_text": END, "vocab_size": ENTRIES}


def looks(more: float) -> list[float]:
    """Return verification costs that grow by `cost` a token."""
    return [1 + more * count for count in range(MOST_DRAFTS + 1)]


@pytest.fixture
def long_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make draft and verification free, so that drafts have full length for any acceptance."""
    monkeypatch.setattr(speculative, "cost_ratio", lambda *_: 0.0)
    monkeypatch.setattr(speculative, "verification_costs", lambda *_: looks(0.0))


@pytest.mark.usefixtures("long_drafts")
@pytest.mark.parametrize("sampling", [GREEDY, PENALIZED])
def test_greedy_text_equals_that_of_the_target(
    target: GPT2LMHeadModel, draft: GPT2LMHeadModel, sampling: SamplingSettings
) -> None:
    for prompt in ([1, 2], [3], [5, 4, 3, 2, 1]):
        found = speculate(target, draft, prompt, sampling, max_new_tokens=24, **SIZES)
        assert found.ids == found.plain_ids
        assert len(found.ids) == 24
        assert found.drafted > 4 * found.calls
        assert 0 < found.kept < found.drafted / 2, "most drafts are wrong, and some tokens after a wrong one are right"


class RecordingStreamer(BaseStreamer):
    """Records the tokens that a streamer receives."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


def test_end_of_text_anywhere_in_a_draft_ends_the_text(target: GPT2LMHeadModel, draft: GPT2LMHeadModel) -> None:
    lengths = set()
    for prompt in ([1, 2], [3], [5, 4, 3, 2, 1], [0], [4, 4]):
        found = speculate(target, draft, prompt, GREEDY, max_new_tokens=24, **SIZES)
        whole = found.ids
        assert found.tokens == found.plain_tokens == 24
        for end in set(whole):
            streamer = RecordingStreamer()
            ids, rounds = speculative_ids(
                target,
                target,
                prompt,
                GREEDY,
                max_new_tokens=24,
                end_of_text=end,
                vocab_size=ENTRIES,
                streamer=streamer,
            )
            assert ids == whole[: whole.index(end)]
            assert sum(one.generated for one in rounds) == len(ids) + 1
            ended = speculate(target, draft, prompt, GREEDY, max_new_tokens=24, end_of_text=end, vocab_size=ENTRIES)
            assert ended.tokens == ended.plain_tokens == len(ids) + 1
            assert streamer.tokens == [*prompt, *ids, end]
            lengths.add(len(ids))
    assert len(lengths) > 3


@pytest.mark.parametrize("sampling", [GREEDY, PENALIZED, FILTERED])
def test_the_target_as_its_own_draft_is_always_accepted(target: GPT2LMHeadModel, sampling: SamplingSettings) -> None:
    own = model(2, seed=0)
    found = speculate(target, own, [1, 2], sampling, max_new_tokens=40, **SIZES)
    assert found.acceptance == 1
    assert found.tokens == found.calls + found.drafted
    assert found.cost_ratio > 0
    assert found.look_ratio > 0


def test_same_seed_samples_the_same_text(target: GPT2LMHeadModel, draft: GPT2LMHeadModel) -> None:
    drawn = [
        speculative_ids(target, draft, [1, 2], FILTERED, max_new_tokens=20, seed=seed, **SIZES)[0] for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_no_filtered_token_is_generated(target: GPT2LMHeadModel, draft: GPT2LMHeadModel) -> None:
    likeliest = SamplingSettings("one", top_k=1)
    greedy = generate_ids(target, [[1, 2]], GREEDY, max_new_tokens=20, **SIZES)[0]
    assert speculative_ids(target, draft, [1, 2], likeliest, max_new_tokens=20, **SIZES)[0] == greedy


def test_draft_length_follows_the_acceptance(target: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy decoding with the model as its own draft, and with one that proposes the model's least likely token."""
    monkeypatch.setattr(speculative, "cost_ratio", lambda *_: 0.02)
    monkeypatch.setattr(speculative, "verification_costs", lambda *_: looks(0.02))
    contrary = model(2, seed=0)
    contrary.lm_head.weight = torch.nn.Parameter(-contrary.lm_head.weight)  # apart from the embedding
    drafted = {}
    for name, draft in (("own", model(2, seed=0)), ("contrary", contrary)):
        _, rounds = speculative_ids(target, draft, [1, 2], GREEDY, max_new_tokens=60, **SIZES)
        drafted[name] = [one.drafted for one in rounds]
    *own, _ = drafted["own"]  # the last one is limited by max_new_tokens
    assert own == sorted(own)
    assert own[-1] > 4 * own[0]
    assert max(drafted["contrary"][:5]) > 1
    assert drafted["contrary"][-30:].count(1) > 25


def drafted_after(kept: int, rounds: int = 40, cost: float = 0.1) -> int:
    """Return the draft length at uniform confidence, after drafts of which `kept` tokens were accepted."""
    length = DraftLength(0.0, looks(cost))
    for _ in range(rounds):
        drafted = 1
        while length.should_continue(0.5) and drafted < MOST_DRAFTS:
            drafted += 1
        length.update(min(kept, drafted))
    return drafted


def test_draft_length_grows_with_acceptance() -> None:
    assert drafted_after(kept=0) == 1
    assert drafted_after(kept=MOST_DRAFTS) > 10
    assert 1 < drafted_after(kept=4) <= 8
    assert drafted_after(kept=4, cost=0.5) < drafted_after(kept=4, cost=0.02)


def test_uncertain_draft_is_shorter() -> None:
    """All confident drafts are accepted, no others."""
    length = DraftLength(0.0, looks(0.1))
    for _ in range(30):
        length.should_continue(0.9)
        length.should_continue(0.3)
        length.update(1)
    assert length.should_continue(0.9)
    assert not length.should_continue(0.3)


DOUBLED_FROM_FOUR = (1.0, 1.1, 1.2, *(1.5 + 0.13 * rows for rows in range(4, MOST_DRAFTS + 2)))


def test_draft_ends_before_a_costlier_verification_if_unlikely() -> None:
    def lengths(kept: float) -> list[int]:
        """Return the lengths of 300 drafts of constant confidence, with this share of tokens accepted."""
        length, draws, found = DraftLength(0.02, DOUBLED_FROM_FOUR), random.Random(0), []
        for _ in range(300):
            drafted = 1
            while length.should_continue(kept):
                drafted += 1
            found.append(drafted)
            length.update(next((n for n in range(drafted) if draws.random() > kept), drafted))
        return found[200:]

    assert set(lengths(0.5)) <= {1, 2}
    assert set(lengths(0.7)) == {2}, "with four tokens a look costs twice as much"
    assert min(lengths(0.97)) > 6


def test_a_speedup_is_predicted_from_tokens_and_costs() -> None:
    found = Speculated([], [], 30, 30, 10, 40, 20, seconds=2.0, plain_seconds=3.0, cost_ratio=0.1, look_ratio=1.4)
    assert found.tokens_per_call == 3
    assert found.acceptance == 0.5
    assert found.speedup == 1.5
    assert found.predicted_speedup == pytest.approx(3 / 1.8)
    assert found.predicted_with_free_looks == pytest.approx(3 / 1.4)


def pairs_drawn(target: GPT2LMHeadModel, draft: GPT2LMHeadModel, count: int) -> torch.Tensor:
    """Return the counts (36,) of each pair of second and third token, of a vocabulary of six."""
    counts = torch.zeros(ENTRIES, ENTRIES)
    for seed in range(count):
        ids, _ = speculative_ids(target, draft, [1, 2], SamplingSettings("drawn"), max_new_tokens=4, seed=seed, **SIZES)
        counts[ids[1], ids[2]] += 1
    return counts.flatten()


def expected_pairs(target: GPT2LMHeadModel) -> torch.Tensor:
    """Return the exact probabilities (36,) of those pairs under the target alone."""

    def following(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return target(torch.tensor([ids])).logits[0, -1].softmax(0)

    total = torch.zeros(ENTRIES, ENTRIES)
    for first, of_first in enumerate(following([1, 2])):
        for second, of_second in enumerate(following([1, 2, first])):
            total[second] += of_first * of_second * following([1, 2, first, second])
    return total.flatten()


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    kept = expected > 5
    counts, expected = (torch.cat([x[kept], x[~kept].sum()[None]]) for x in (counts, expected))
    return float(((counts - expected) ** 2 / expected.clamp_min(1)).sum())


@pytest.mark.usefixtures("long_drafts")
@pytest.mark.parametrize("texts", [FEW, pytest.param(5000, marks=pytest.mark.slow)])
def test_sampled_text_is_distributed_as_the_target(texts: int, target: GPT2LMHeadModel, draft: GPT2LMHeadModel) -> None:
    """Chi-square over at most 36 cells: 66.6 is exceeded once in a thousand times at 35 degrees of freedom."""
    assert chi_square(pairs_drawn(target, draft, texts), expected_pairs(target)) < 66.6


def accept_all(drafts: torch.Tensor, _: torch.Tensor, scores: torch.Tensor, draws: bool) -> tuple[int, torch.Tensor]:
    return len(drafts), scores[-1].softmax(0).multinomial(1)[None]


def replace_from_target(
    drafts: torch.Tensor, draft_scores: torch.Tensor, scores: torch.Tensor, draws: bool
) -> tuple[int, torch.Tensor]:
    """Replace a rejected draft by a sample of the target, as if it had not been rejected."""
    kept, _ = accept(drafts, draft_scores, scores, draws)
    return kept, scores[kept].softmax(0).multinomial(1)[None]


@pytest.mark.usefixtures("long_drafts")
@pytest.mark.parametrize("rule", [accept_all, pytest.param(replace_from_target, marks=pytest.mark.slow)])
def test_same_statistic_detects_a_wrong_rule(
    rule: Callable[..., tuple[int, torch.Tensor]],
    target: GPT2LMHeadModel,
    draft: GPT2LMHeadModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speculative, "accept", rule)
    assert chi_square(pairs_drawn(target, draft, FEW), expected_pairs(target)) > 66.6
