"""The LM-head loss equals its plain twin in value and gradient for every chunk size."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2lab.losses.dense_teacher import DenseTeacher
from gpt2lab.losses.lm_head_loss import lm_head_loss
from gpt2lab.losses.sampled_teacher import SampledTeacher
from gpt2lab.losses.top_k_teacher import TopKTeacher
from gpt2lab.settings import CrossEntropySettings, LossSettings
from tests.conftest import in_words

ROWS, WIDTH, TEACHER_WIDTH, VOCABULARY = 23, 16, 24, 101
KL = LossSettings("forward_kl", temperature=2.0, hard_weight=0.3)
MIXES = [
    LossSettings("forward_kl", hard_weight=0.0),
    LossSettings("forward_kl", hard_weight=1.0),
    KL,
    LossSettings("forward_kl", temperature=2.0, scale_t2=False, hard_weight=0.3),
    LossSettings("forward_kl", temperature=0.7, hard_weight=0.5),
    LossSettings("reverse_kl", temperature=2.0, hard_weight=0.3),
    LossSettings("jsd", hard_weight=0.0),
    LossSettings("jsd", temperature=1.5, hard_weight=0.2, beta=0.1),
    LossSettings("jsd", hard_weight=0.2, beta=0.0),
    LossSettings("jsd", hard_weight=0.2, beta=1.0),
    LossSettings("skew_kl", temperature=2.0, hard_weight=0.3),
    LossSettings("skew_reverse_kl", temperature=2.0, hard_weight=0.3, alpha=0.3),
    LossSettings("tvd", temperature=2.0, hard_weight=0.3),
    LossSettings("taid", temperature=2.0, hard_weight=0.3),
    LossSettings("mse", temperature=2.0, hard_weight=0.3),
    LossSettings("uld", temperature=2.0, hard_weight=0.3),
]
OF_EVERY_LOGIT = ("mse", "uld")  # which a top-k teacher cannot serve
DIVERGENCES = [LossSettings(name, hard_weight=0.0) for name in dict.fromkeys(mix.name for mix in MIXES)]
MASKS = {"none": [], "some": range(0, ROWS, 3), "all but one": range(1, ROWS), "tail": range(15, ROWS)}
SMOOTHED = CrossEntropySettings(label_smoothing=0.1, z_loss=1e-2)
MIXING = torch.tensor(0.4, dtype=torch.float64)


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def divergence_twin(z_s: Tensor, z_t: Tensor, mix: LossSettings) -> Tensor:
    """Compute a divergence (N,) from two logits (N, V) by probabilities, as written in the papers."""
    q, p = z_s.softmax(-1), z_t.softmax(-1)
    match mix.name:
        case "forward_kl":
            return kl_divergence(p, q)
        case "reverse_kl":
            return kl_divergence(q, p)
        case "jsd" if mix.beta in (0, 1):
            return kl_divergence(q, p) if mix.beta else kl_divergence(p, q)
        case "jsd":
            m = mix.beta * p + (1 - mix.beta) * q
            return mix.beta * kl_divergence(p, m) + (1 - mix.beta) * kl_divergence(q, m)
        case "skew_kl":
            return kl_divergence(p, mix.alpha * p + (1 - mix.alpha) * q)
        case "skew_reverse_kl":
            return kl_divergence(q, (1 - mix.alpha) * p + mix.alpha * q)
        case "tvd":
            return (p - q).abs().sum(-1) / 2
        case "taid":
            target = ((1 - MIXING) * z_s + MIXING * z_t).softmax(-1).detach()
            return kl_divergence(target, q)
        case "mse":
            return ((z_s - z_s.mean(-1, True)) - (z_t - z_t.mean(-1, True))).square().mean(-1)
        case "uld":
            return (q.sort(-1, descending=True).values - p.sort(-1, descending=True).values).abs().sum(-1)
    raise AssertionError(mix.name)


def twin(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: DenseTeacher | None,
    mix: LossSettings | None,
    hard: CrossEntropySettings,
) -> Tensor:
    """Compute the same loss densely and by autograd, as written in textbooks."""
    logits, kept = hidden @ weight.T, labels != -100
    objective = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=hard.label_smoothing)
    objective = objective + hard.z_loss * logits.logsumexp(-1)[kept].square().sum()
    if teacher is None or mix is None:
        return objective
    soft = divergence_twin(logits / mix.temperature, teacher.hidden @ teacher.weight.T / mix.temperature, mix)
    scale = mix.temperature**2 if mix.scale_t2 else 1.0
    return mix.hard_weight * objective + (1 - mix.hard_weight) * scale * soft[kept].sum()


def example(dtype: torch.dtype, mask: str = "some") -> tuple[Tensor, Tensor, Tensor, DenseTeacher]:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    weight = (torch.randn(VOCABULARY, WIDTH, dtype=dtype) / WIDTH**0.5).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (ROWS,))
    labels[list(MASKS[mask])] = -100
    teacher = DenseTeacher(
        torch.randn(ROWS, TEACHER_WIDTH, dtype=dtype), torch.randn(VOCABULARY, TEACHER_WIDTH, dtype=dtype) / 4
    )
    return hidden, weight, labels, teacher


def assert_gradients_close(ours: Tensor, theirs: Tensor, of: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Relative L2 difference of the gradients with respect to hidden states and head."""
    pairs = zip(torch.autograd.grad(ours / 17, of), torch.autograd.grad(theirs / 17, of), strict=True)
    for mine, reference in pairs:
        assert (mine - reference).norm() <= tolerance * reference.norm().clamp_min(1e-12)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("chunk_rows", [1, 7, 4096])
@pytest.mark.parametrize("mix", [None, *MIXES], ids=in_words)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradients_equal_the_dense_twin(mask, chunk_rows, mix, dtype, tolerance) -> None:
    hidden, weight, labels, teacher = example(dtype, mask)
    teacher = teacher if mix else None
    for hard in (CrossEntropySettings(), SMOOTHED):
        given = {"teacher": teacher, "loss": mix, "hard": hard, "mixing": MIXING, "chunk_rows": chunk_rows}
        result = lm_head_loss(hidden, weight, labels, **given)
        expected = twin(hidden, weight, labels, teacher, mix, hard)
        torch.testing.assert_close(result.total, expected, rtol=tolerance, atol=tolerance)
        assert_gradients_close(result.total, expected, (hidden, weight), tolerance)
        plain = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
        torch.testing.assert_close(result.cross_entropy, plain.detach(), rtol=tolerance, atol=tolerance)
    assert result.tokens == (labels != -100).sum()


@pytest.mark.parametrize("mix", [None, KL, *DIVERGENCES], ids=in_words)
def test_gradcheck_in_double_precision(mix) -> None:
    if mix is not None and mix.name == "taid":
        pytest.skip("TAID's target is the student's own, taken as constant: no gradient of its value")
    hidden, weight, labels, teacher = example(torch.float64)
    hidden, weight, labels = hidden.detach()[:5, :4], weight.detach()[:9, :4], labels[:5] % 9
    labels[2] = -100
    teacher = DenseTeacher(teacher.hidden[:5], teacher.weight[:9]) if mix else None
    of = (hidden.requires_grad_(), weight.requires_grad_())
    given = {"teacher": teacher, "loss": mix, "hard": SMOOTHED, "chunk_rows": 2}
    assert torch.autograd.gradcheck(lambda h, w: lm_head_loss(h, w, labels, **given).total, of)


@pytest.mark.parametrize("mix", [None, *DIVERGENCES], ids=in_words)
def test_all_targets_ignored_gives_zero_and_no_nan(mix) -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    result = lm_head_loss(hidden, weight, torch.full_like(labels, -100), teacher=teacher if mix else None, loss=mix)
    result.total.backward()
    assert result.total == 0
    assert result.tokens == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("mix", DIVERGENCES, ids=in_words)
def test_student_equal_to_its_teacher_has_no_loss_and_gradient(mix, temperature) -> None:
    hidden, weight, labels, _ = example(torch.float64)
    teacher = DenseTeacher(hidden.detach(), weight.detach())
    result = lm_head_loss(hidden, weight, labels, teacher=teacher, loss=replace(mix, temperature=temperature))
    result.total.backward()
    assert abs(result.total.item()) < 1e-10
    assert hidden.grad.abs().max() < 1e-12


@pytest.mark.parametrize("mix", DIVERGENCES, ids=in_words)
def test_zero_teacher_probabilities_give_finite_losses(mix) -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    ruled_out = teacher.weight.clone()
    ruled_out[:50] = -float("inf")
    teacher = DenseTeacher(teacher.hidden.abs(), ruled_out)  # positive hidden states: logits of −inf
    assert (teacher.hidden @ ruled_out.T).isneginf().any()
    result = lm_head_loss(hidden, weight, labels % 50 + 50, teacher=teacher, loss=mix)
    result.total.backward()
    assert torch.isfinite(result.total)
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("mix", DIVERGENCES, ids=in_words)
def test_logits_far_apart_give_finite_losses(mix) -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    teacher = replace(teacher, hidden=300 * teacher.hidden)
    result = lm_head_loss(300 * hidden, weight, labels, teacher=teacher, loss=mix)
    result.total.backward()
    assert torch.isfinite(result.total)
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("mix", [None, KL, *DIVERGENCES], ids=in_words)
def test_padding_of_either_vocabulary_is_in_no_softmax(mix) -> None:
    hidden, weight, labels, teacher = example(torch.float64)
    labels %= 90  # the padded labels of example() are no longer −100, which has no effect here
    padded = replace(teacher, weight=torch.cat([teacher.weight[:90], torch.full((20, TEACHER_WIDTH), 9.0)]))
    exact = replace(teacher, weight=teacher.weight[:90])
    given = {"loss": mix, "hard": SMOOTHED, "vocab_size": 90}
    ours = lm_head_loss(hidden, weight, labels, teacher=padded if mix else None, **given)
    theirs = lm_head_loss(hidden, weight[:90], labels, teacher=exact if mix else None, loss=mix, hard=SMOOTHED)
    assert torch.equal(ours.total, theirs.total)
    assert_gradients_close(ours.total, theirs.total, (hidden, weight), 1e-12)
    if mix:
        cut_by_teacher = lm_head_loss(hidden, weight, labels, teacher=exact, loss=mix, hard=SMOOTHED)
        assert torch.equal(ours.total, cut_by_teacher.total)


@pytest.mark.parametrize("mix", [None, KL, *DIVERGENCES], ids=in_words)
def test_bf16_autocast_keeps_the_loss_in_fp32_and_close_to_it(mix) -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    teacher = teacher if mix else None
    exact = lm_head_loss(hidden, weight, labels, teacher=teacher, loss=mix)
    with torch.autocast("cpu", torch.bfloat16):
        result = lm_head_loss(hidden, weight, labels, teacher=teacher, loss=mix, chunk_rows=16)
    assert result.total.dtype == torch.float32
    torch.testing.assert_close(result.total, exact.total, rtol=2e-2, atol=0)
    ours, theirs = torch.autograd.grad(result.total, weight)[0], torch.autograd.grad(exact.total, weight)[0]
    assert ours.dtype == torch.float32
    # The gradients of TVD and ULD are made of signs, and rounding turns some of those where p and q are close: once
    # sorted, as in ULD, they are close at most ranks.
    tolerance = {"tvd": 1e-1, "uld": 4e-1}.get(mix.name if mix else "", 3e-2)
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


# Sparse teachers


def top_k(teacher: DenseTeacher, temperature: float, k: int, *, with_tail: bool = True) -> TopKTeacher:
    p = (teacher.hidden @ teacher.weight.T / temperature).softmax(-1)
    probabilities, ids = p.topk(k)
    tail = (1 - probabilities.sum(1, keepdim=True)).clamp_min(0)
    if not with_tail:
        probabilities, tail = probabilities / probabilities.sum(1, keepdim=True), torch.zeros_like(tail)
    return TopKTeacher(ids, torch.cat([probabilities, tail], 1).log())


def top_k_twin(logits: Tensor, teacher: TopKTeacher, mix: LossSettings) -> Tensor:
    """The divergence of two distributions over K + 1 buckets, from their logarithms as logits."""
    q = (logits / mix.temperature).softmax(-1)
    of_k = q.gather(1, teacher.ids)
    q_buckets = torch.cat([of_k, 1 - of_k.sum(1, keepdim=True)], 1)
    return divergence_twin(q_buckets.log(), teacher.logs.exp().clamp_min(1e-30).log(), mix)


@pytest.mark.parametrize("with_tail", [True, False])
@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix.name not in OF_EVERY_LOGIT], ids=in_words)
def test_a_top_k_teacher_equals_its_bucketed_twin(mix, with_tail) -> None:
    if not with_tail and mix.name != "forward_kl":
        pytest.skip("the twin itself is infinite or undefined on an empty bucket")
    hidden, weight, labels, dense = example(torch.float64)
    teacher, logits, kept = top_k(dense, mix.temperature, 7, with_tail=with_tail), hidden @ weight.T, labels != -100
    result = lm_head_loss(hidden, weight, labels, teacher=teacher, loss=mix, mixing=MIXING, chunk_rows=7)
    scale = mix.temperature**2 if mix.scale_t2 else 1.0
    expected = mix.hard_weight * F.cross_entropy(logits, labels, reduction="sum")
    expected = expected + (1 - mix.hard_weight) * scale * top_k_twin(logits, teacher, mix)[kept].sum()
    torch.testing.assert_close(result.total, expected, rtol=1e-10, atol=1e-10)
    assert_gradients_close(result.total, expected, (hidden, weight), 1e-9)


@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix.name not in OF_EVERY_LOGIT], ids=in_words)
def test_top_k_teacher_with_all_tokens_equals_the_dense_one(mix) -> None:
    hidden, weight, labels, dense = example(torch.float32)
    teacher = top_k(dense, mix.temperature, VOCABULARY, with_tail=False)
    sparse = lm_head_loss(hidden, weight, labels, teacher=teacher, loss=mix, mixing=MIXING)
    online = lm_head_loss(hidden, weight, labels, teacher=dense, loss=mix, mixing=MIXING)
    torch.testing.assert_close(sparse.total, online.total, rtol=1e-6, atol=1e-6)
    assert_gradients_close(sparse.total, online.total, (hidden, weight), 1e-6)


@pytest.mark.parametrize("mix", [MIXES[0], KL], ids=in_words)
def test_teacher_draws_estimate_forward_kl_without_bias(mix) -> None:
    hidden, weight, labels, dense = example(torch.float64)
    p = (dense.hidden @ dense.weight.T / mix.temperature).softmax(-1)
    entropy = -(p * p.log()).sum(1)
    torch.manual_seed(1)
    draws = SampledTeacher(torch.multinomial(p, 200_000, replacement=True), entropy)
    sampled = lm_head_loss(hidden, weight, labels, teacher=draws, loss=mix)
    online = lm_head_loss(hidden, weight, labels, teacher=dense, loss=mix)
    torch.testing.assert_close(sampled.divergence, online.divergence, rtol=5e-3, atol=0)
    assert_gradients_close(sampled.total, online.total, (hidden, weight), 2e-2)


def test_loss_on_draws_is_their_cross_entropy() -> None:
    hidden, weight, labels, _ = example(torch.float64, "none")
    draws = torch.randint(0, VOCABULARY, (ROWS, 5))
    draws[:, 1] = draws[:, 0]  # a token sampled twice counts twice
    result = lm_head_loss(
        hidden, weight, labels, teacher=SampledTeacher(draws, torch.zeros(ROWS)), loss=MIXES[0], chunk_rows=7
    )
    expected = sum(F.cross_entropy(hidden @ weight.T, draws[:, i], reduction="sum") for i in range(5)) / 5
    torch.testing.assert_close(result.total, expected, rtol=1e-12, atol=0)
    assert_gradients_close(result.total, expected, (hidden, weight), 1e-12)


@pytest.mark.parametrize("mix", DIVERGENCES[1:], ids=in_words)
def test_draws_are_refused_for_losses_they_would_bias(mix) -> None:
    hidden, weight, labels, _ = example(torch.float32)
    draws = SampledTeacher(torch.zeros(ROWS, 5, dtype=torch.int64), torch.zeros(ROWS))
    with pytest.raises(ValueError, match="a sampled teacher supports loss=forward_kl"):
        lm_head_loss(hidden, weight, labels, teacher=draws, loss=mix)


@pytest.mark.parametrize("mix", [None, KL, LossSettings("uld", hard_weight=0.3)], ids=in_words)
@pytest.mark.parametrize(("compiled", "tolerance"), [(False, 1e-12), pytest.param(True, 1e-5, marks=pytest.mark.slow)])
def test_logits_padded_as_on_a_gpu_equal_the_dense_twin(
    mix, compiled, tolerance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2lab.losses.logit_chunks.padding_rows", lambda weight: -len(weight) % 64)
    hidden, weight, labels, teacher = example(torch.float64)
    teacher = teacher if mix else None
    result = lm_head_loss(hidden, weight, labels, teacher=teacher, loss=mix, chunk_rows=7, compiled=compiled)
    expected = twin(hidden, weight, labels, teacher, mix, CrossEntropySettings())
    torch.testing.assert_close(result.total, expected, rtol=tolerance, atol=tolerance)
    assert_gradients_close(result.total, expected, (hidden, weight), tolerance)


# Compiled, checkpointed, without gradients


@pytest.mark.slow
@pytest.mark.parametrize("mix", [None, KL, *DIVERGENCES], ids=in_words)
def test_every_compiled_chunk_gives_the_same(mix) -> None:
    hidden, weight, labels, dense = example(torch.float32)
    compiled_equals_plain(mix, hidden, weight, labels, dense if mix else None)
    if mix and mix.name not in OF_EVERY_LOGIT:
        compiled_equals_plain(mix, hidden, weight, labels, top_k(dense, mix.temperature, 7))


def test_the_compiled_chunk_gives_the_same() -> None:
    hidden, weight, labels, dense = example(torch.float32)
    mix = LossSettings("jsd", temperature=2.0, hard_weight=0.3)
    compiled_equals_plain(mix, hidden, weight, labels, dense, chunk_rows=ROWS)  # a last chunk is compiled once more


def compiled_equals_plain(mix, hidden, weight, labels, teacher, chunk_rows: int = 16) -> None:
    given = {"teacher": teacher, "loss": mix, "mixing": MIXING, "chunk_rows": chunk_rows}
    plain = lm_head_loss(hidden, weight, labels, **given)
    compiled = lm_head_loss(hidden, weight, labels, **given, compiled=True)
    torch.testing.assert_close(plain.total, compiled.total, rtol=1e-5, atol=1e-5)
    assert_gradients_close(plain.total, compiled.total, (hidden, weight), 1e-5)


def test_loss_works_in_torch_compile_and_checkpointing() -> None:
    hidden, weight, labels, teacher = example(torch.float32)

    def loss(h: Tensor) -> Tensor:
        return lm_head_loss(h.tanh(), weight, labels, teacher=teacher, loss=KL).total

    plain = loss(hidden)
    for other in (torch.compile(loss)(hidden), torch.utils.checkpoint.checkpoint(loss, hidden, use_reentrant=False)):
        torch.testing.assert_close(plain, other)
        assert_gradients_close(plain, other, (hidden, weight), 1e-5)
        plain = loss(hidden)


def test_a_frozen_head_costs_no_weight_gradient() -> None:
    hidden, weight, labels, _ = example(torch.float32)
    lm_head_loss(hidden, weight.detach(), labels).total.backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("mix", [None, KL], ids=in_words)
def test_values_under_no_grad_are_equal_and_form_no_gradient(mix) -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    given = {"teacher": teacher if mix else None, "loss": mix, "chunk_rows": 16}
    trained = lm_head_loss(hidden, weight, labels, **given)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt2lab.losses.chunk_losses._hard_gradient", None)  # what every gradient here needs
        scored = lm_head_loss(hidden, weight, labels, **given)
    assert torch.equal(trained.total, scored.total)
    assert torch.equal(trained.divergence, scored.divergence)


def test_training_works_after_a_loss_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2lab.losses.lm_head_loss._workspaces", {})
    hidden, weight, labels, _ = example(torch.float32)
    with torch.inference_mode():
        expected = lm_head_loss(hidden, weight, labels).total.item()
    result = lm_head_loss(hidden, weight, labels)
    result.total.backward()
    assert result.total.item() == expected
