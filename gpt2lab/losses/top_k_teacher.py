"""Top-k teacher: a teacher stored as its K most probable tokens at each target.

Shapes: N positions, C positions of one chunk, V vocabulary, K stored tokens of one position.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from gpt2lab.losses.divergences import SMALLEST_LOG, Distribution, Divergence, finite, softmax
from gpt2lab.losses.logit_chunks import Head
from gpt2lab.losses.teacher_signal import TOP, Classes, TeacherChunk, TeacherLoss, TeacherSignal
from gpt2lab.settings import LossSettings

ABSENT = -1e20  # replaces a logit: below every real one, and finite where no token is left


@dataclass(frozen=True)
class TopKTeacher(TeacherSignal):
    """The top-K tokens at the loss's temperature, best first, and the probability of all others together.

    Without `logs` a probability of 0 counts as the smallest number of its dtype.
    """

    only_targets: ClassVar[bool] = True

    ids: Tensor  # (N, K) int64, no token twice in a row
    probabilities: Tensor  # (N, K)
    tail: Tensor  # (N,) probability of all other tokens; 0 where the K were scaled to sum to 1
    logs: Tensor | None = None  # (N, K + 1) log-probabilities of the K and of all others, exact where those underflow

    @property
    def rows(self) -> int:
        return len(self.ids)

    @property
    def class_logs(self) -> Tensor:
        """(N, K + 1) log-probabilities of the K tokens and of all others together; −inf where these have none."""
        if self.logs is not None:
            return self.logs
        given = torch.finfo(self.probabilities.dtype)
        top = self.probabilities.to(torch.promote_types(torch.float32, self.probabilities.dtype)).log()  # (N, K)
        tail = self.tail.to(top.dtype).clamp_min(0).log().unsqueeze(1)  # (N, 1)
        return torch.cat([top.clamp_min(math.log(given.tiny) + math.log(given.eps)), tail], dim=1)

    def select(self, positions: Tensor) -> Self:
        logs = self.logs[positions] if self.logs is not None else None
        return replace(
            self,
            ids=self.ids[positions],
            probabilities=self.probabilities[positions],
            tail=self.tail[positions],
            logs=logs,
        )

    def reader(self, vocab_size: int, head_of: Callable[[Tensor], Head]) -> Callable[[slice], TeacherChunk]:
        logs = self.class_logs
        return lambda rows: (self.ids[rows], logs[rows])

    @staticmethod
    def term(
        chunk: TeacherChunk, student: Distribution, temperature: float, distance: Divergence
    ) -> tuple[Tensor, Tensor]:
        """Divergence over K tokens and one class for all others, whose logit is the logsumexp of theirs.

        The gradient of that class reaches its tokens in proportion to their share of it. They have a softmax of their
        own, for in that of the whole vocabulary all of them may underflow.
        """
        ids, logs = chunk  # (C, K), (C, K + 1)
        others = student.scores.scatter(1, ids, ABSENT)  # (C, V)
        largest = others.amax(1, keepdim=True)  # (C, 1)
        others = others.sub_(largest).clamp_min_(SMALLEST_LOG).exp_()
        total = others.sum(1, keepdim=True)  # (C, 1)
        classes = torch.cat([student.scores.gather(1, ids), largest + total.log()], dim=1)  # (C, K + 1)
        loss, gradient = distance(softmax(logs.to(classes.dtype)), softmax(classes))
        return loss, others.mul_(gradient[:, -1:] / total).scatter_(1, ids, gradient[:, :-1])

    @classmethod
    def check(cls, loss: LossSettings) -> None:
        if loss.name in ("mse", "uld"):
            raise ValueError(f"loss={loss.name} compares every logit, and a top-k teacher has only some.")

    @staticmethod
    def classes(chunk: TeacherChunk, log_q: Tensor, labels: Tensor) -> Classes:
        ids, logs = chunk
        others = log_q.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)  # (C, 1)
        is_label = torch.cat([ids == labels.unsqueeze(1), torch.ones_like(others, dtype=torch.bool)], dim=1)
        class_of_label = is_label.to(torch.uint8).argmax(1)  # (C,) the first that contains it
        return Classes(
            log_p=logs.to(log_q.dtype).log_softmax(1),  # float16 records miss a sum of 1 by rounding
            labels=class_of_label,
            top1=torch.zeros_like(class_of_label),
            top5=ids[:, :TOP],
            log_q=torch.cat([log_q.gather(1, ids), others], dim=1),  # (C, K + 1)
        )

    def loss(self, labels: Tensor, vocab_size: int) -> TeacherLoss:
        """Approximate: the tokens that are not stored share their probability evenly."""
        hit = self.ids == labels.unsqueeze(1)  # (N, K)
        others, logs = max(vocab_size - self.ids.shape[1], 1), finite(self.class_logs)
        of_label = torch.where(hit.any(1), (logs[:, :-1] * hit).sum(1), logs[:, -1] - math.log(others))
        return TeacherLoss(-of_label.sum(), len(labels), len(labels))
