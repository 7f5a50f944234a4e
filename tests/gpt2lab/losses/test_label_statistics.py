"""Loss, rank and confidence of targets equal those of whole rows of logits."""

import gc

import pytest
import torch
import torch.nn.functional as F

from gpt2lab.losses.label_statistics import ROWS, TOKENS_OF_A_TILE, LabelStatistics, label_statistics, vocabulary_tiles

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}


def plain_statistics(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> LabelStatistics:
    """The same from whole rows of logits, in float64."""
    logits = hidden.double() @ weight.double().T  # (n, V)
    nats = F.cross_entropy(logits, labels, reduction="none")
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    return LabelStatistics(nats, rank, logits.softmax(1).amax(1))


def inputs(targets: int, vocab_size: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (n, 32), head (V, 32) and labels (n,), some of which are the top-1 token."""
    draws = torch.Generator().manual_seed(targets + vocab_size)
    hidden, weight = torch.randn(targets, 32, generator=draws), torch.randn(vocab_size, 32, generator=draws)
    labels = torch.randint(vocab_size, (targets,), generator=draws)
    best = (hidden @ weight.T).argmax(1)
    return hidden * scale, weight, torch.where(torch.arange(targets) % 3 == 0, best, labels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("vocab_size", [2, TOKENS_OF_A_TILE, TOKENS_OF_A_TILE + 1, 2 * TOKENS_OF_A_TILE + 300])
@pytest.mark.parametrize("targets", [0, 1, 5, ROWS + 7])
def test_label_statistics_equal_those_of_whole_rows(targets: int, vocab_size: int, dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs(targets, vocab_size)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    found = label_statistics(hidden, vocabulary_tiles(weight, dtype), labels)
    expected = plain_statistics(hidden, weight, labels)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found.nats.double(), expected.nats, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.confidence.double(), expected.confidence, rtol=tolerance * 10, atol=tolerance)
    assert torch.equal(found.rank.long(), expected.rank)


@pytest.mark.parametrize("targets", [1, ROWS + 7])
def test_bf16_logits_change_the_statistics_by_their_rounding(targets: int) -> None:
    hidden, weight, labels = inputs(targets, 2 * TOKENS_OF_A_TILE + 300, scale=0.2)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    found = label_statistics(hidden, vocabulary_tiles(weight, torch.bfloat16), labels)
    expected = plain_statistics(hidden, weight, labels)
    torch.testing.assert_close(found.nats.double(), expected.nats, rtol=0, atol=0.02)
    logits = hidden.double() @ weight.double().T
    above = logits - logits.gather(1, labels[:, None])  # logits are below 8, where neighbours in bf16 differ by 2⁻⁵
    assert (found.rank >= (above > 2**-5).sum(1)).all()
    assert (found.rank <= (above > -(2**-5)).sum(1)).all()


@pytest.mark.parametrize("scale", [30.0, 1e3, 1e6])
def test_logits_hundreds_of_nats_apart_have_finite_losses(scale: float) -> None:
    hidden, weight, labels = inputs(50, 2 * TOKENS_OF_A_TILE + 300, scale)
    found = label_statistics(hidden, vocabulary_tiles(weight, torch.float32), labels)
    expected = plain_statistics(hidden, weight, labels)
    torch.testing.assert_close(found.nats.double(), expected.nats, rtol=2e-6, atol=scale * 1e-5)
    assert torch.equal(found.rank.long(), expected.rank)


def test_equal_logits_do_not_outrank_the_label() -> None:
    hidden, weight = torch.ones(3, 8), torch.ones(TOKENS_OF_A_TILE + 5, 8)
    found = label_statistics(
        hidden, vocabulary_tiles(weight, torch.float32), torch.tensor([0, TOKENS_OF_A_TILE, TOKENS_OF_A_TILE + 4])
    )
    assert found.rank.tolist() == [0, 0, 0]
    torch.testing.assert_close(found.confidence, torch.full((3,), 1 / (TOKENS_OF_A_TILE + 5)))


def test_infinite_hidden_states_give_no_finite_loss() -> None:
    for value in (torch.nan, torch.inf):
        hidden, weight, labels = inputs(3, 10)
        hidden[1] = value
        found = label_statistics(hidden, vocabulary_tiles(weight, torch.float32), labels)
        assert found.nats.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_infinite_logit_of_a_label_gives_no_finite_loss(sign: int) -> None:
    hidden, weight, labels = inputs(3, 10)
    hidden[1, 0], weight[labels[1]] = 1.0, 0.0
    weight[labels[1], 0] = sign * torch.inf
    found = label_statistics(hidden, vocabulary_tiles(weight, torch.float32), labels)
    assert not found.nats[1].isfinite()


@pytest.mark.parametrize("label", [-100, -1, 10])
def test_an_unknown_label_is_an_error_and_leaves_autocast_alone(label: int) -> None:
    hidden, weight, labels = inputs(3, 10)
    labels[1] = label
    with pytest.raises(IndexError), torch.autocast("cpu", torch.bfloat16):
        label_statistics(hidden, vocabulary_tiles(weight, torch.bfloat16), labels)
    gc.collect()
    assert not torch.is_autocast_enabled("cpu")
