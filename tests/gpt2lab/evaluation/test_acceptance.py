"""Acceptance in speculative decoding: the sampled rate equals the theory, and a wrong rule is detected."""

import pytest
import torch
from torch import Tensor

from gpt2lab.evaluation import acceptance
from gpt2lab.evaluation.acceptance import (
    ACCEPTED,
    DRAW_VARIANCE,
    acceptance_sums,
    cost_ratio,
    estimate_speculation,
    speedup,
)
from gpt2lab.settings import ModelShape

POSITIONS, VOCABULARY = 20_000, 60


@pytest.fixture(scope="module")
def models() -> tuple[Tensor, Tensor]:
    """Log-probabilities of a draft and a target model that agree about as well as a student and its teacher."""
    generator = torch.Generator().manual_seed(0)
    target = 2 * torch.randn(POSITIONS, VOCABULARY, generator=generator)
    draft = target + torch.randn(POSITIONS, VOCABULARY, generator=generator)
    return draft.log_softmax(1), target.log_softmax(1)


def deviation(models: tuple[Tensor, Tensor], seed: int = 1) -> float:
    """Return how many standard errors the measured acceptance is above 1 − TVD."""
    log_q, log_p = models
    expected = 1 - (log_q.exp() - log_p.exp()).abs().sum(1).mean().item() / 2
    sums = acceptance_sums(log_q, log_p, torch.rand(POSITIONS, 2, generator=torch.Generator().manual_seed(seed)))
    found = estimate_speculation(expected, sums, POSITIONS, 0.1)
    assert 0 < found.acceptance_standard_error < 0.005
    assert 0.5 < expected < 0.9, "the example decides nothing"
    return (found.acceptance_measured - expected) / found.acceptance_standard_error


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_measured_acceptance_is_one_minus_tvd(models, seed) -> None:
    assert abs(deviation(models, seed)) < 4


@pytest.mark.parametrize(
    "rule",
    [
        lambda log_p, log_q, uniform: log_p.exp() > 0,  # independent of the target
        lambda log_p, log_q, uniform: uniform < 0.9 * (log_p - log_q).exp().clamp_max(1),  # capped below 1
        lambda log_p, log_q, uniform: uniform < (log_q - log_p).exp(),  # the inverse ratio
        lambda log_p, log_q, uniform: uniform < log_p.exp(),  # not divided by its proposal probability
    ],
    ids=["always", "capped", "turned", "undivided"],
)
def test_wrong_acceptance_rule_is_detected(models, monkeypatch, rule) -> None:
    monkeypatch.setattr(acceptance, "is_accepted", rule)
    assert abs(deviation(models)) > 8


def test_drafts_of_another_distribution_are_detected(models, monkeypatch) -> None:
    monkeypatch.setattr(torch, "searchsorted", lambda sums, values, right: values.mul(VOCABULARY).long())  # uniformly
    assert abs(deviation(models)) > 8


def test_sampling_and_acceptance_use_separate_random_numbers() -> None:
    """One number for both would accept exactly the first token of these two, 0.5 instead of 0.5 + 0.1."""
    log_q, log_p = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    uniforms = torch.rand(POSITIONS, 2, generator=torch.Generator().manual_seed(0))
    sums = acceptance_sums(log_q.expand(POSITIONS, 2), log_p.expand(POSITIONS, 2), uniforms)
    error = sums[DRAW_VARIANCE].item() ** 0.5
    assert abs(sums[ACCEPTED].item() - 0.6 * POSITIONS) < 4 * error < 0.02 * POSITIONS


def test_drafts_are_sampled_from_the_student(monkeypatch) -> None:
    log_q = torch.tensor([0.5, 0.0, 0.3, 0.2]).log().expand(20_000, 4)
    seen = []
    monkeypatch.setattr(acceptance, "is_accepted", lambda log_p, log_q, uniform: seen.append(log_q) or uniform < 1)
    acceptance_sums(log_q, log_q, torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0)))
    drawn = seen[0].exp()
    for probability in (0.5, 0.3, 0.2):
        share = drawn.isclose(torch.tensor(probability)).double().mean().item()
        assert share == pytest.approx(probability, abs=0.015)  # four standard errors
    assert not (drawn == 0).any()


def test_accepted_and_corrected_tokens_follow_the_target() -> None:
    """The promise of speculative decoding: a rejected draft is replaced from the positive part of p − q."""
    q, p = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    generator, draws = torch.Generator().manual_seed(0), 40_000
    drawn = q.expand(draws, 3).multinomial(1, generator=generator).squeeze(1)
    kept = acceptance.is_accepted(p.log()[drawn], q.log()[drawn], torch.rand(draws, generator=generator))
    rest = (p - q).clamp_min(0)
    other = rest.expand(draws, 3).multinomial(1, generator=generator).squeeze(1)
    written = torch.where(kept, drawn, other).bincount(minlength=3) / draws
    torch.testing.assert_close(written, p, rtol=0, atol=0.01)  # four standard errors


def test_student_equal_to_its_teacher_has_every_draft_accepted(models) -> None:
    sums = acceptance_sums(models[1], models[1], torch.rand(POSITIONS, 2))
    assert sums[ACCEPTED] == POSITIONS
    assert sums[DRAW_VARIANCE] < 0.1


@pytest.mark.parametrize(
    ("kept", "drafts", "tokens"), [(0.6, 2, 1.96), (0.7, 3, 2.53), (0.8, 5, 3.69), (0.9, 10, 6.86), (1.0, 4, 5.0)]
)
def test_expected_tokens_follow_the_formula(kept, drafts, tokens) -> None:
    found = acceptance.tokens_per_target_call(kept, drafts)
    assert found == pytest.approx(tokens, abs=0.005)
    if kept < 1:
        assert found == pytest.approx((1 - kept ** (drafts + 1)) / (1 - kept))


def test_expected_tokens_are_those_of_a_simulated_decoding() -> None:
    generator = torch.Generator().manual_seed(0)
    coins = torch.rand(50_000, 5, generator=generator) < 0.7
    gained = coins.long().cumprod(1).sum(1) + 1  # drafts up to the first rejected one, and the target's own token
    assert acceptance.tokens_per_target_call(0.7, 5) == pytest.approx(gained.double().mean().item(), abs=0.03)


@pytest.mark.parametrize(("kept", "ratio", "drafts"), [(0.6947, 0.2369, 2), (0.95, 0.01, 16), (0.2, 0.5, 1)])
def test_the_best_number_of_drafts_is_no_worse_than_any_other(kept, ratio, drafts) -> None:
    found = estimate_speculation(kept, {ACCEPTED: torch.tensor(1.0), DRAW_VARIANCE: torch.tensor(1.0)}, 2, ratio)
    assert found.drafts == drafts
    assert found.speedup == max(speedup(kept, count, ratio) for count in range(1, 17))


def test_draft_cost_is_the_ratio_of_flops() -> None:
    nano, micro = ModelShape(2, 2, 128, 1024, 4096), ModelShape(4, 4, 256, 1024, 4096)
    assert cost_ratio(micro, micro, 256) == 1
    without_positions = 1_052_160 - 1024 * 128, 4_470_272 - 1024 * 256
    costs = 6 * without_positions[0] + 12 * 2 * 128 * 256, 6 * without_positions[1] + 12 * 4 * 256 * 256
    assert cost_ratio(nano, micro, 256) == pytest.approx(costs[0] / costs[1])
