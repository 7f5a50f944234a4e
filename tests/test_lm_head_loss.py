"""The LM-head loss equals its plain twin in value and gradient, whatever the chunk size."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2lab.lm_head_loss import DenseTeacher, lm_head_loss
from gpt2lab.settings import LossSettings

ROWS, WIDTH, TEACHER_WIDTH, VOCABULARY = 53, 24, 40, 211
MIXES = [
    LossSettings("forward_kl", temperature=1.0, scale_t2=True, hard_weight=0.0),
    LossSettings("forward_kl", temperature=1.0, scale_t2=True, hard_weight=1.0),
    LossSettings("forward_kl", temperature=2.0, scale_t2=True, hard_weight=0.3),
    LossSettings("forward_kl", temperature=2.0, scale_t2=False, hard_weight=0.3),
    LossSettings("forward_kl", temperature=0.7, scale_t2=True, hard_weight=0.5),
]
MASKS = ["none", "some", "all but one", "tail"]


def twin(
    hidden: Tensor, weight: Tensor, labels: Tensor, teacher: DenseTeacher | None, mix: LossSettings | None
) -> Tensor:
    """Dense and by autograd: the same loss as written in textbooks."""
    logits = hidden @ weight.T
    cross_entropy = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    if teacher is None:
        return cross_entropy
    kept = labels != -100
    log_q = (logits / mix.temperature).log_softmax(-1)
    p = (teacher.hidden @ teacher.weight.T / mix.temperature).softmax(-1)
    kl = F.kl_div(log_q, p, reduction="none").sum(-1)[kept].sum()
    scale = mix.temperature**2 if mix.scale_t2 else 1.0
    return mix.hard_weight * cross_entropy + (1 - mix.hard_weight) * scale * kl


def example(dtype: torch.dtype, mask: str = "some") -> tuple[Tensor, Tensor, Tensor, DenseTeacher]:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    weight = (torch.randn(VOCABULARY, WIDTH, dtype=dtype) / WIDTH**0.5).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (ROWS,))
    ignored = {
        "none": [],
        "some": list(range(0, ROWS, 3)),
        "all but one": list(range(1, ROWS)),
        "tail": range(40, ROWS),
    }
    labels[list(ignored[mask])] = -100
    teacher = DenseTeacher(
        torch.randn(ROWS, TEACHER_WIDTH, dtype=dtype), torch.randn(VOCABULARY, TEACHER_WIDTH, dtype=dtype) / 4
    )
    return hidden, weight, labels, teacher


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("chunk_rows", [1, 7, ROWS, 4096])
@pytest.mark.parametrize("mix", [None, *MIXES], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradients_equal_the_dense_twin(mask, chunk_rows, mix, dtype, tolerance) -> None:
    hidden, weight, labels, teacher = example(dtype, mask)
    teacher = teacher if mix else None
    result = lm_head_loss(hidden, weight, labels, teacher=teacher, loss=mix, chunk_rows=chunk_rows)
    expected = twin(hidden, weight, labels, teacher, mix)
    torch.testing.assert_close(result.total, expected, rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad(result.total / 17, (hidden, weight))
    theirs = torch.autograd.grad(expected / 17, (hidden, weight))
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine - reference).norm() <= tolerance * reference.norm().clamp_min(1e-12)
    assert result.tokens == (labels != -100).sum()


@pytest.mark.parametrize("mix", [None, MIXES[2]], ids=str)
def test_gradcheck_in_double_precision(mix) -> None:
    hidden, weight, labels, teacher = example(torch.float64)
    hidden, weight, labels = (t.detach()[:9] for t in (hidden, weight, labels % 9))
    labels[2] = -100
    teacher = DenseTeacher(teacher.hidden[:9], teacher.weight[:9]) if mix else None
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: lm_head_loss(h, w, labels, teacher=teacher, loss=mix, chunk_rows=4).total, (hidden, weight)
    )


def test_all_targets_ignored_gives_zero_and_no_nan() -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    result = lm_head_loss(hidden, weight, torch.full_like(labels, -100), teacher=teacher, loss=MIXES[2])
    result.total.backward()
    assert result.total == 0
    assert result.tokens == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_a_student_equal_to_its_teacher_gets_no_gradient_from_the_kl() -> None:
    hidden, weight, labels, _ = example(torch.float64)
    teacher = DenseTeacher(hidden.detach(), weight.detach())
    result = lm_head_loss(hidden, weight, labels, teacher=teacher, loss=MIXES[0])
    result.total.backward()
    assert abs(result.total.item()) < 1e-10
    assert hidden.grad.abs().max() < 1e-12


def test_a_teacher_that_rules_tokens_out_gives_no_nan() -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    ruled_out = teacher.weight.clone()
    ruled_out[:50] = -float("inf")
    shifted = DenseTeacher(teacher.hidden.abs(), ruled_out)  # positive hidden states: logits of −inf
    result = lm_head_loss(hidden, weight, labels, teacher=shifted, loss=MIXES[2])
    result.total.backward()
    assert torch.isfinite(result.total)
    assert torch.isfinite(hidden.grad).all()


def test_bf16_autocast_keeps_the_loss_in_fp32_and_close_to_it() -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    exact = twin(hidden, weight, labels, teacher, MIXES[2])
    with torch.autocast("cpu", torch.bfloat16):
        result = lm_head_loss(hidden, weight, labels, teacher=teacher, loss=MIXES[2], chunk_rows=16)
    assert result.total.dtype == torch.float32
    torch.testing.assert_close(result.total, exact, rtol=1e-2, atol=0)
    ours, theirs = torch.autograd.grad(result.total, weight)[0], torch.autograd.grad(exact, weight)[0]
    assert ours.dtype == torch.float32
    assert (ours - theirs).norm() <= 2e-2 * theirs.norm()


def test_the_compiled_chunk_gives_the_same() -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    plain = lm_head_loss(hidden, weight, labels, teacher=teacher, loss=MIXES[2], chunk_rows=16)
    compiled = lm_head_loss(hidden, weight, labels, teacher=teacher, loss=MIXES[2], chunk_rows=16, compiled=True)
    torch.testing.assert_close(plain.total, compiled.total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(plain.total, weight)[0],
        torch.autograd.grad(compiled.total, weight)[0],
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_frozen_head_costs_no_weight_gradient() -> None:
    hidden, weight, labels, _ = example(torch.float32)
    lm_head_loss(hidden, weight.detach(), labels).total.backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("mix", [None, MIXES[2]], ids=str)
def test_without_gradients_the_values_are_the_same_and_no_gradient_is_formed(mix) -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    given = {"teacher": teacher if mix else None, "loss": mix, "chunk_rows": 16}
    trained = lm_head_loss(hidden, weight, labels, **given)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt2lab.lm_head_loss._subtract_at_labels", None)  # what every gradient needs
        scored = lm_head_loss(hidden, weight, labels, **given)
    assert torch.equal(trained.total, scored.total)
    assert torch.equal(trained.divergence, scored.divergence)


def test_teacher_and_student_of_different_vocabularies_are_refused() -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    with pytest.raises(ValueError, match="not one vocabulary"):
        lm_head_loss(hidden, weight[:200], labels, teacher=teacher, loss=MIXES[0])
