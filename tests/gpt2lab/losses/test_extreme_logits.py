"""Losses equal a dense float64 twin at logits hundreds of nats apart, with a loaded teacher and with a cached one."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2lab import metric_names as names
from gpt2lab.data.batch import IGNORE_INDEX
from gpt2lab.distillation.teacher_cache import CacheSide
from gpt2lab.evaluation.distillation_metrics import distillation_sums
from gpt2lab.losses.dense_teacher import DenseTeacher
from gpt2lab.losses.lm_head_loss import lm_head_loss
from gpt2lab.losses.target_losses import target_losses
from gpt2lab.losses.top_k_teacher import TopKTeacher
from gpt2lab.settings import CrossEntropySettings, LossSettings, TeacherCacheSettings
from tests.conftest import in_words
from tests.gpt2lab.distillation.test_teacher_cache import VOCABULARY, TalkativePairs, batches

ROWS, K = 12, 32
SPREADS = (3.0, 100.0, 3e4)  # nats between logits: ordinary, beyond e^−87, beyond 1e4
# For the value and the gradient with respect to the logits, times the spread if that exceeds 1: rounding of
# fp32 at the size of the logits. The gradient is returned in the dtype of the logits: half a unit of its last digit.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DENSE = [
    LossSettings("forward_kl", hard_weight=0.0),
    LossSettings("reverse_kl", hard_weight=0.0),
    LossSettings("jsd", hard_weight=0.0, beta=0.1),
    LossSettings("skew_kl", hard_weight=0.0),
    LossSettings("skew_kl", hard_weight=0.0, alpha=0.0),
    LossSettings("skew_reverse_kl", hard_weight=0.0),
    LossSettings("skew_reverse_kl", hard_weight=0.0, alpha=0.0),
    LossSettings("tvd", hard_weight=0.0),
    LossSettings("taid", hard_weight=0.0),
    LossSettings("mse", hard_weight=0.0),
    LossSettings("uld", hard_weight=0.0),
]
TOP_K = [mix for mix in DENSE if mix.name not in ("mse", "uld")]
MIXING = torch.tensor(0.4)
ABSENT = -1e9  # log-probability of a token of probability 0, in the twin


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def twin(log_q: Tensor, log_p: Tensor, mix: LossSettings) -> Tensor:
    """The divergence (N,) from log-probabilities (N, V) in float64, as written in the papers."""

    def mixture(share_of_q: float) -> Tensor:
        return torch.logaddexp(log_p + math.log(1 - share_of_q), log_q + math.log(share_of_q))

    match mix.name, mix.alpha:
        case ("forward_kl", _) | ("skew_kl", 0.0):
            return kl(log_p, log_q)
        case ("reverse_kl", _) | ("skew_reverse_kl", 0.0):
            return kl(log_q, log_p)
        case "jsd", _:
            m = mixture(1 - mix.beta)
            return mix.beta * kl(log_p, m) + (1 - mix.beta) * kl(log_q, m)
        case "skew_kl", alpha:
            return kl(log_p, mixture(1 - alpha))
        case "skew_reverse_kl", alpha:
            return kl(log_q, mixture(alpha))
        case "tvd", _:
            return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
        case "taid", _:
            target = ((1 - MIXING) * log_q + MIXING * log_p).log_softmax(-1).detach()
            return kl(target, log_q)
        case "mse", _:
            difference = log_q - log_p
            return (difference - difference.mean(-1, keepdim=True)).square().mean(-1)
        case "uld", _:
            return (log_q.exp().sort(-1).values - log_p.exp().sort(-1).values).abs().sum(-1)
    raise AssertionError(mix.name)


def logits_of(seed: int, spread: float, dtype: torch.dtype) -> Tensor:
    """Return logits (N, V); with an identity as head they are the hidden states too, so no product rounds them."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(ROWS, VOCABULARY, generator=generator) * spread / 4).to(dtype)


def assert_as_the_twin(
    total: Tensor, hidden: Tensor, expected: Tensor, exact: Tensor, tolerance: float, smooth: bool = True
) -> None:
    """Compare value, and gradient with respect to the logits, to `tolerance` of the larger of 1 and the twin's.

    Args:
        smooth: without it the value alone; TVD's and ULD's gradients are made of signs, which rounding and ties turn.
    """
    ours, theirs = torch.autograd.grad(total, hidden)[0].double(), torch.autograd.grad(expected, exact)[0]
    assert abs(total.item() - expected.item()) <= tolerance * max(abs(expected.item()), ROWS)
    if smooth:
        assert (ours - theirs).norm() <= tolerance * max(theirs.norm().item(), 1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("hard", [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-3)], ids=["plain", "label_smoothing", "z_loss"])
def test_cross_entropy_is_exact_at_any_logits(spread, dtype, hard) -> None:
    hidden = logits_of(0, spread, dtype).requires_grad_()
    labels = hidden.argmin(1)  # the logit furthest below the largest; the first of a row is no less in some rows
    labels[::2] = 0
    exact, head = hidden.detach().double().requires_grad_(), torch.eye(VOCABULARY, dtype=dtype)
    ours = lm_head_loss(hidden, head, labels, hard=CrossEntropySettings(*hard))
    plain = F.cross_entropy(exact, labels, reduction="sum")
    expected = F.cross_entropy(exact, labels, reduction="sum", label_smoothing=hard[0])
    expected = expected + hard[1] * exact.logsumexp(1).square().sum()
    tolerance = TOLERANCE[dtype]
    assert_as_the_twin(ours.total, hidden, expected, exact, tolerance)
    assert ours.cross_entropy.item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, -500.0, 3e3])
@pytest.mark.parametrize("spread", SPREADS)
def test_validation_loss_per_target_is_exact_at_any_logits(spread, offset) -> None:
    """An offset common to all logits has no effect; columns beyond the vocabulary have the largest logits."""
    logits = logits_of(0, spread, torch.float32) + offset
    labels, padded = logits.argmin(1), F.pad(logits, (0, 3), value=1e5)
    expected = F.cross_entropy(logits.double(), labels, reduction="none")
    found = target_losses(padded, torch.eye(padded.shape[1]), labels, VOCABULARY)
    assert found.double().tolist() == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("mix", DENSE, ids=in_words)
def test_divergences_are_exact_at_any_logits(mix, spread, dtype) -> None:
    head = torch.eye(VOCABULARY, dtype=dtype)
    for temperature in (0.5, 1.0, 3.0):
        settings = LossSettings(mix.name, temperature, scale_t2=False, hard_weight=0.0, alpha=mix.alpha, beta=mix.beta)
        hidden, theirs = logits_of(1, spread, dtype).requires_grad_(), logits_of(2, spread, dtype)
        teacher, labels = DenseTeacher(theirs, head), torch.zeros(ROWS, dtype=torch.long)
        total = lm_head_loss(hidden, head, labels, teacher=teacher, loss=settings, mixing=MIXING).total
        exact = hidden.detach().double().requires_grad_()
        log_q, log_p = (exact / temperature).log_softmax(1), (theirs.double() / temperature).log_softmax(1)
        expected = twin(log_q, log_p, settings).sum()
        tolerance = TOLERANCE[dtype] + 1e-7 * spread / temperature
        assert_as_the_twin(total, hidden, expected, exact, tolerance, mix.name != "uld" or dtype == torch.float32)


@pytest.mark.parametrize("spread", SPREADS)
def test_validation_figures_are_exact_at_any_logits(spread) -> None:
    hidden, theirs, head = (
        logits_of(1, spread, torch.float32),
        logits_of(2, spread, torch.float32),
        torch.eye(VOCABULARY),
    )
    labels = hidden.argmin(1)
    log_q, log_p = hidden.double().log_softmax(1), theirs.double().log_softmax(1)
    expected = {
        names.VAL_LOSS: F.nll_loss(log_q, labels, reduction="sum"),
        names.DISTILL_TEACHER_LOSS: F.nll_loss(log_p, labels, reduction="sum"),
        names.DISTILL_KL: kl(log_p, log_q).sum(),
        names.DISTILL_REVERSE_KL: kl(log_q, log_p).sum(),
        names.DISTILL_TVD: (log_p.exp() - log_q.exp()).abs().sum() / 2,
        names.DISTILL_ENTROPY_STUDENT: -(log_q.exp() * log_q).sum(),
        names.DISTILL_ENTROPY_TEACHER: -(log_p.exp() * log_p).sum(),
    }
    found = distillation_sums(hidden, head, labels, DenseTeacher(theirs, head))
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-5), name


# Cached teachers


def cached(
    folder: Path, settings: TeacherCacheSettings, temperature: float, spread: float
) -> tuple[Tensor, TopKTeacher]:
    """Logits (N, V) of a teacher at the targets of some pairs, and their cached records."""
    samples, head = TalkativePairs(samples=4), torch.eye(VOCABULARY)
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3)) * spread / 4
    side, rows = CacheSide(folder, "train", settings, VOCABULARY), np.arange(4)
    side.create(samples)
    side.write(batches(samples, rows), lambda batch: DenseTeacher(table[batch.input_ids.flatten()], head), temperature)
    batch = samples.batch(rows, 0)
    signal = side.signal(batch)
    assert isinstance(signal, TopKTeacher)
    return table[batch.input_ids[batch.labels != IGNORE_INDEX]], signal


def merged(log_probabilities: Tensor, ids: Tensor, *, tail: bool) -> Tensor:
    """Merge (N, V) into (N, K + 1): K tokens and the sum of all others, or the K normalized alone."""
    others = log_probabilities.scatter(1, ids, -math.inf).logsumexp(1, keepdim=True)
    kept = log_probabilities.gather(1, ids)
    return torch.cat([kept, others] if tail else [kept.log_softmax(1), torch.full_like(others, ABSENT)], 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 2**-10)])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("spread", SPREADS[:2])
@pytest.mark.parametrize("mix", TOP_K, ids=in_words)
def test_a_top_k_cache_gives_the_gradient_of_its_teacher(tmp_path, mix, spread, tail, dtype, tolerance) -> None:
    if not tail and mix.is_reverse_kl:
        pytest.skip("infinite, and refused")
    for temperature in (0.5, 1.0, 2.0, 4.0):
        folder = tmp_path / str(temperature)
        folder.mkdir()
        settings = LossSettings(mix.name, temperature, scale_t2=False, hard_weight=0.0, alpha=mix.alpha, beta=mix.beta)
        cache = TeacherCacheSettings("topk", k=K, tail=tail, dtype=dtype)
        theirs, teacher = cached(folder, cache, temperature, spread)
        hidden = (torch.randn(theirs.shape, generator=torch.Generator().manual_seed(4)) * spread / 4).requires_grad_()
        labels = torch.zeros(len(hidden), dtype=torch.long)
        head = torch.eye(VOCABULARY)
        total = lm_head_loss(hidden, head, labels, teacher=teacher, loss=settings, mixing=MIXING).total
        exact = hidden.detach().double().requires_grad_()
        log_q, log_p = (exact / temperature).log_softmax(1), (theirs.double() / temperature).log_softmax(1)
        log_q, log_p = merged(log_q, teacher.ids, tail=True), merged(log_p, teacher.ids, tail=tail)
        expected = twin(log_q, log_p, settings).sum()
        smooth = mix.name != "tvd" or dtype == "float32"
        assert_as_the_twin(total, hidden, expected, exact, tolerance + 1e-7 * spread / temperature, smooth)
