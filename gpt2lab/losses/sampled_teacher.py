"""Sampled teacher: a teacher stored as K tokens sampled from its distribution at each target.

Shapes: N positions, C positions of one chunk, V vocabulary size, K stored tokens of one
position.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from gpt2lab.losses.divergences import LINEAR_IN_TEACHER, Distribution, Divergence
from gpt2lab.losses.logit_chunks import Head
from gpt2lab.losses.teacher_signal import TeacherChunk, TeacherSignal
from gpt2lab.settings import LossSettings


@dataclass(frozen=True)
class SampledTeacher(TeacherSignal):
    """K samples from the teacher's distribution at the loss's temperature; a token may occur several times.

    Its estimate of the forward KL is unbiased. Source: random-sampling distillation, arXiv 2503.16870.
    """

    only_targets: ClassVar[bool] = True

    ids: Tensor  # (N, K) int64
    entropy: Tensor  # (N,) in nats, of the whole distribution; cross-entropy minus entropy is the KL

    @property
    def rows(self) -> int:
        return len(self.ids)

    def select(self, positions: Tensor) -> Self:
        return replace(self, ids=self.ids[positions], entropy=self.entropy[positions])

    def reader(self, vocab_size: int, head_of: Callable[[Tensor], Head]) -> Callable[[slice], TeacherChunk]:
        return lambda rows: (self.ids[rows], self.entropy[rows])

    @staticmethod
    def term(
        chunk: TeacherChunk, student: Distribution, temperature: float, distance: Divergence
    ) -> tuple[Tensor, Tensor]:
        """Estimate the forward KL: cross-entropy on the samples minus the teacher's entropy."""
        ids, entropy = chunk  # (C, K), (C,)
        loss = -student.log_at(ids).mean(1) - entropy
        share = torch.full_like(ids, -1.0 / ids.shape[1], dtype=student.value.dtype)
        return loss, student.value.scatter_add(1, ids, share)

    @classmethod
    def check(cls, loss: LossSettings) -> None:
        if loss.name not in LINEAR_IN_TEACHER:
            raise ValueError(
                f"loss={loss.name} is not linear in the teacher's probabilities, so samples would bias it; "
                "a sampled teacher supports loss=forward_kl."
            )
