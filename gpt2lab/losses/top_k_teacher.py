"""Top-k teacher: a teacher stored as its top-K tokens at each target.

Shapes: N positions, C positions of one chunk, V vocabulary size, K stored tokens of one position.
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

ABSENT = -1e20  # replaces a logit: below all others, and finite where no token is left


@dataclass(frozen=True)
class TopKTeacher(TeacherSignal):
    """Top-K tokens at the loss's temperature, best first, and the total probability of all others (the tail)."""

    only_targets: ClassVar[bool] = True

    ids: Tensor  # (N, K) int64, distinct in each row
    logs: Tensor  # (N, K + 1) log-probabilities of the K tokens and of the tail; −inf for an empty tail

    @property
    def rows(self) -> int:
        return len(self.ids)

    def select(self, positions: Tensor) -> Self:
        return replace(self, ids=self.ids[positions], logs=self.logs[positions])

    def reader(self, vocab_size: int, head_of: Callable[[Tensor], Head]) -> Callable[[slice], TeacherChunk]:
        return lambda rows: (self.ids[rows], self.logs[rows])

    @staticmethod
    def term(
        chunk: TeacherChunk, student: Distribution, temperature: float, distance: Divergence
    ) -> tuple[Tensor, Tensor]:
        """Compute the divergence over K + 1 classes: K tokens, and the tail with the logsumexp of its logits.

        The gradient of the tail is distributed over its tokens by their softmax within the tail; in the softmax of the
        whole vocabulary all of them may underflow.
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
            raise ValueError(
                f"loss={loss.name} compares all logits, but a top-k teacher stores only K; use another loss."
            )

    @staticmethod
    def classes(chunk: TeacherChunk, log_q: Tensor, labels: Tensor) -> Classes:
        ids, logs = chunk
        others = log_q.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)  # (C, 1)
        is_label = torch.cat([ids == labels.unsqueeze(1), torch.ones_like(others, dtype=torch.bool)], dim=1)
        class_of_label = is_label.to(torch.uint8).argmax(1)  # (C,) the first match
        return Classes(
            log_p=logs.to(log_q.dtype).log_softmax(1),  # rounded to float16, they do not sum to 1 exactly
            labels=class_of_label,
            top1=torch.zeros_like(class_of_label),
            top5=ids[:, :TOP],
            log_q=torch.cat([log_q.gather(1, ids), others], dim=1),  # (C, K + 1)
        )

    def loss(self, labels: Tensor, vocab_size: int) -> TeacherLoss:
        """Estimate the cross-entropy; the tail is spread evenly over its tokens."""
        hit = self.ids == labels.unsqueeze(1)  # (N, K)
        others, logs = max(vocab_size - self.ids.shape[1], 1), finite(self.logs)
        label_logs = torch.where(hit.any(1), (logs[:, :-1] * hit).sum(1), logs[:, -1] - math.log(others))
        return TeacherLoss(-label_logs.sum(), len(labels), len(labels))
