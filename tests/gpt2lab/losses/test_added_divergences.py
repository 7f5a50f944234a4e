"""Divergences of a user: by autograd or with their own gradient, they train like built-in ones."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gpt2lab.errors import InputError
from gpt2lab.losses.dense_teacher import DenseTeacher
from gpt2lab.losses.divergences import Distribution, forward_kl
from gpt2lab.losses.lm_head_loss import lm_head_loss
from gpt2lab.losses.teacher_signal import TeacherSignal
from gpt2lab.losses.top_k_teacher import TopKTeacher
from gpt2lab.settings import DIVERGENCES, LossSettings
from tests.support.extending import forgetting_plugins

ROWS, WIDTH, VOCABULARY = 12, 8, 31


def by_autograd(teacher: Distribution, student: Distribution) -> Tensor:
    return (teacher.value * (teacher.log - student.log)).sum(1)


@pytest.fixture(autouse=True)
def added() -> Iterator[None]:
    with forgetting_plugins():
        DIVERGENCES.add("own_kl")(by_autograd)
        DIVERGENCES.add("own_closed_kl")(lambda teacher, student: forward_kl(teacher, student))
        yield


def top_k() -> TeacherSignal:
    logits = torch.randn(ROWS, VOCABULARY, dtype=torch.float64)
    logs, ids = logits.log_softmax(1).topk(5)
    tail = torch.log1p(-logs.exp().sum(1))
    return TopKTeacher(ids, torch.cat([logs, tail[:, None]], 1))


def gradients(name: str, teacher: TeacherSignal, compiled: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and its gradients with respect to hidden states and head."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (
        torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        for rows in (ROWS, VOCABULARY)
    )
    labels = torch.arange(ROWS) % VOCABULARY
    loss = LossSettings(name, temperature=2.0, hard_weight=0.3)
    result = lm_head_loss(hidden, weight, labels, teacher=teacher, loss=loss, chunk_rows=5, compiled=compiled)
    return (result.total, *torch.autograd.grad(result.total, (hidden, weight)))


@pytest.mark.parametrize("name", ["own_kl", "own_closed_kl"])
@pytest.mark.parametrize("kind", ["dense", "top_k"])
def test_an_added_divergence_has_the_gradient_of_its_twin(name: str, kind: str):
    torch.manual_seed(0)
    dense = DenseTeacher(torch.randn(ROWS, 6, dtype=torch.float64), torch.randn(VOCABULARY, 6, dtype=torch.float64))
    teacher = dense if kind == "dense" else top_k()
    for ours, theirs in zip(gradients(name, teacher), gradients("forward_kl", teacher), strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@pytest.mark.slow
def test_an_added_divergence_runs_in_a_compiled_loss():
    torch.manual_seed(0)
    teacher = DenseTeacher(torch.randn(ROWS, 6, dtype=torch.float64), torch.randn(VOCABULARY, 6, dtype=torch.float64))
    for ours, theirs in zip(gradients("own_kl", teacher, True), gradients("forward_kl", teacher), strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


def test_a_taken_name_is_refused():
    with pytest.raises(InputError, match="adds the divergence jsd, a name that is built in"):
        DIVERGENCES.add("jsd")(by_autograd)
    DIVERGENCES.add("own_kl")(by_autograd)  # the same module may be imported again
    assert [*DIVERGENCES][-2:] == ["own_kl", "own_closed_kl"]
    with pytest.raises(InputError, match=r"is that of tests\.gpt2lab\.losses"):
        DIVERGENCES.add("own_kl")(forward_kl)
