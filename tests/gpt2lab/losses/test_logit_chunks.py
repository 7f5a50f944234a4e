"""Logits in chunks equal one matrix product, and a teacher of a new kind needs one class."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2lab.evaluation.distillation_metrics import distillation_sums
from gpt2lab.losses.dense_teacher import DenseTeacher
from gpt2lab.losses.divergences import Distribution, Divergence, softmax
from gpt2lab.losses.label_statistics import label_statistics, vocabulary_tiles
from gpt2lab.losses.lm_head_loss import lm_head_loss
from gpt2lab.losses.logit_chunks import Head, logit_chunks
from gpt2lab.losses.teacher_signal import Classes, TeacherChunk, TeacherSignal, log_softmax, token_classes, top_tokens
from gpt2lab.settings import LossSettings

ROWS, WIDTH, VOCABULARY = 23, 8, 31


@pytest.fixture
def head() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(VOCABULARY, WIDTH, requires_grad=True)


@pytest.mark.parametrize(
    ("most", "rows", "chunks"), [(2**20, None, 1), (5 * VOCABULARY, None, 5), (1, None, 23), (1, 7, 4)]
)
def test_chunks_join_to_the_whole_product_without_gradients(head, most, rows, chunks) -> None:
    hidden, weight = head
    found = list(logit_chunks(hidden, weight, most=most, rows=rows))
    assert len(found) == chunks
    assert [row for part, logits in found for row in range(ROWS)[part]] == list(range(ROWS))
    joined = torch.cat([logits for _, logits in found])
    assert not joined.requires_grad
    torch.testing.assert_close(joined, (hidden @ weight.T).detach())


def test_chunks_padded_as_on_a_gpu_join_to_the_whole_product(head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2lab.losses.logit_chunks.padding_rows", lambda weight: -len(weight) % 64)
    hidden, weight = (tensor.detach() for tensor in head)
    (_, logits), labels = next(logit_chunks(hidden, weight)), torch.arange(ROWS)
    torch.testing.assert_close(logits, hidden @ weight.T)
    found = label_statistics(hidden, vocabulary_tiles(weight, torch.float32), labels)
    torch.testing.assert_close(found.nats, F.cross_entropy(hidden @ weight.T, labels, reduction="none"))
    assert (found.rank < VOCABULARY).all()


def test_no_rows_give_one_empty_chunk(head) -> None:
    hidden, weight = head
    ((rows, logits),) = logit_chunks(hidden[:0], weight)
    assert logits.shape == (0, VOCABULARY)
    assert range(0)[rows] == range(0)


def test_dtype_is_that_of_autocast_at_the_call(head) -> None:
    hidden, weight = head
    with torch.autocast("cpu", torch.bfloat16):
        half, whole = logit_chunks(hidden, weight), logit_chunks(hidden, weight, dtype=torch.float32)
        assert next(whole)[1].dtype == torch.float32
    assert next(half)[1].dtype == torch.bfloat16


@dataclass(frozen=True)
class StoredLogits(TeacherSignal):
    """A kind of teacher that is defined here alone: stored logits."""

    logits: Tensor  # (N, V)

    @property
    def rows(self) -> int:
        return len(self.logits)

    def select(self, positions: Tensor) -> Self:
        return replace(self, logits=self.logits[positions])

    def reader(self, vocab_size: int, head_of: Callable[[Tensor], Head]) -> Callable[[slice], TeacherChunk]:
        return lambda rows: (self.logits[rows, :vocab_size],)

    @staticmethod
    def term(
        chunk: TeacherChunk, student: Distribution, temperature: float, distance: Divergence
    ) -> tuple[Tensor, Tensor]:
        return distance(softmax(chunk[0], temperature), student)

    @staticmethod
    def classes(chunk: TeacherChunk, log_q: Tensor, labels: Tensor) -> Classes:
        return token_classes(log_softmax(chunk[0]), labels, top_tokens(chunk[0]))

    @classmethod
    def check(cls, loss: LossSettings) -> None:
        if loss.name == "uld":
            raise ValueError("loss=uld: not with stored logits.")


def test_a_new_kind_of_teacher_is_one_class(head) -> None:
    """Loss and metrics equal those of the online teacher with the same logits."""
    hidden, weight = (tensor.detach() for tensor in head)
    online = DenseTeacher(torch.randn(ROWS, 5), torch.randn(VOCABULARY, 5))
    stored, loss = StoredLogits(online.hidden @ online.weight.T), LossSettings("jsd", temperature=2.0)
    labels = torch.arange(ROWS)
    labels[::3] = -100
    losses = [lm_head_loss(hidden, weight, labels, teacher=kind, loss=loss, chunk_rows=4) for kind in (online, stored)]
    torch.testing.assert_close(losses[0].total, losses[1].total)
    expected, found = (distillation_sums(hidden, weight, labels, kind, chunk_rows=4) for kind in (online, stored))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    with pytest.raises(ValueError, match="not with stored logits"):
        lm_head_loss(hidden, weight, labels, teacher=stored, loss=LossSettings("uld"))
