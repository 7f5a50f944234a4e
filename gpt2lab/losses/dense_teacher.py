"""Dense teacher: an online teacher that shares the student's tokenizer.

Shapes: N positions, C positions of one chunk, D and Dt hidden widths of student and teacher, V vocabulary size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from gpt2lab.losses.divergences import Distribution, Divergence, softmax
from gpt2lab.losses.logit_chunks import Head
from gpt2lab.losses.target_losses import target_losses
from gpt2lab.losses.teacher_signal import (
    Classes,
    TeacherChunk,
    TeacherLoss,
    TeacherSignal,
    log_softmax,
    token_classes,
    top_tokens,
)
from gpt2lab.settings import LossSettings


@dataclass(frozen=True)
class DenseTeacher(TeacherSignal):
    """Hidden states and head weight of an online teacher with the student's tokenizer; Dt may differ from D."""

    hidden: Tensor  # (N, Dt)
    weight: Tensor  # (V, Dt)

    @property
    def rows(self) -> int:
        return len(self.hidden)

    def select(self, positions: Tensor) -> Self:
        return replace(self, hidden=self.hidden[positions])

    def reader(self, vocab_size: int, head_of: Callable[[Tensor], Head]) -> Callable[[slice], TeacherChunk]:
        head = head_of(self.weight[:vocab_size])
        return lambda rows: (head(self.hidden[rows]),)

    @staticmethod
    def term(
        chunk: TeacherChunk, student: Distribution, temperature: float, distance: Divergence
    ) -> tuple[Tensor, Tensor]:
        (logits,) = chunk  # (C, V)
        return distance(softmax(logits, temperature), student)

    @classmethod
    def check(cls, loss: LossSettings) -> None:
        """Accept every loss: the whole distribution is available."""

    @staticmethod
    def classes(chunk: TeacherChunk, log_q: Tensor, labels: Tensor) -> Classes:
        (logits,) = chunk  # (C, V)
        # Top-k of the logits, so that a compiled chunk never writes its log-probabilities to memory.
        return token_classes(log_softmax(logits), labels, top_tokens(logits))

    def loss(self, labels: Tensor, vocab_size: int) -> TeacherLoss:
        nats = target_losses(self.hidden, self.weight, labels, vocab_size)
        return TeacherLoss(nats.sum(), len(labels), len(labels))

    def shared_vocabulary(self, vocab_size: int) -> int:
        return min(vocab_size, len(self.weight))

    def in_fp32(self) -> Self:
        return replace(self, hidden=self.hidden.float(), weight=self.weight.float())

    @property
    def hidden_states(self) -> Tensor:
        return self.hidden
