"""Speculative decoding: the target's own text, faster; what it reports is what happened."""

import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2lab.backbone import Backbone
from gpt2lab.generation import GREEDY, Sampling, generate_ids
from gpt2lab.settings import ModelShape
from gpt2lab.speculative import Calls, speculate

ENTRIES, END = 6, -1


def model(layers: int, seed: int, entries: int = ENTRIES) -> GPT2LMHeadModel:
    """Random weights, large enough that distributions are far from even and depend on what was written."""
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


def test_greedy_text_is_the_targets(target: GPT2LMHeadModel, draft: GPT2LMHeadModel) -> None:
    for prompt in ([1, 2], [3], [5, 4, 3, 2, 1]):
        found = speculate(target, draft, prompt, GREEDY, max_new_tokens=24, end_of_text=END, entries=ENTRIES)
        assert found.ids == found.plain_ids
        assert len(found.ids) == 24


def test_the_target_as_its_own_draft_is_always_accepted(target: GPT2LMHeadModel) -> None:
    own = model(2, seed=0)
    found = speculate(target, own, [1, 2], GREEDY, max_new_tokens=40, end_of_text=END, entries=ENTRIES)
    assert found.acceptance == 1
    assert found.tokens_per_call > 2
    assert found.tokens == found.calls + found.drafted
    assert found.cost_ratio > 0


def pairs_drawn(target: GPT2LMHeadModel, draft: GPT2LMHeadModel, count: int) -> torch.Tensor:
    """(36,) how often each pair of second and third token was written; the first one's call also reads the prompt."""
    counts = torch.zeros(ENTRIES, ENTRIES)
    for seed in range(count):
        ids = generate_ids(
            target, [[1, 2]], Sampling("drawn"), max_new_tokens=3, end_of_text=END, seed=seed, assistant=draft
        )[0]
        counts[ids[1], ids[2]] += 1
    return counts.flatten()


def expected_pairs(target: GPT2LMHeadModel) -> torch.Tensor:
    """(36,) the exact probabilities of those pairs under the target alone."""

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


@pytest.mark.slow
def test_drawn_text_is_distributed_as_the_targets(
    target: GPT2LMHeadModel, draft: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chi-square over at most 36 cells: 66.6 is exceeded once in a thousand times at 35 degrees of freedom.

    Where every draft is accepted, the text is the draft model's, and the same statistic shows it.
    """
    expected = expected_pairs(target)
    assert chi_square(pairs_drawn(target, draft, 2500), expected) < 66.6
    from transformers.generation import utils

    def accept_all(candidate_input_ids, candidate_logits, candidate_length, new_logits, **_):
        length = candidate_length
        following = new_logits[:, length].softmax(-1).multinomial(1)
        drafts = candidate_input_ids[:, candidate_input_ids.shape[1] - candidate_length :][:, :length]
        return torch.cat([drafts, following], 1), length

    monkeypatch.setattr(utils, "_speculative_sampling", accept_all)
    assert chi_square(pairs_drawn(target, draft, 2500), expected) > 66.6


def test_calls_are_counted_while_asked(target: GPT2LMHeadModel) -> None:
    ids = torch.tensor([[1, 2, 3]])
    with Calls(target) as calls:
        target(ids)
        target(ids)
    target(ids)
    assert len(calls.seconds) == 2
    assert 0 < calls.median() < 1
