"""Aligned teacher: an online teacher with a different tokenizer, and a batch's text tokenized by it.

Shapes: N student positions, M teacher positions, C positions of one chunk, Dt teacher's hidden width, W teacher's
vocabulary size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from gpt2lab.data.batch import IGNORE_INDEX
from gpt2lab.losses.divergences import Distribution, Divergence, softmax, universal_logit_distance
from gpt2lab.losses.logit_chunks import Head
from gpt2lab.losses.target_losses import target_losses
from gpt2lab.losses.teacher_signal import TeacherChunk, TeacherLoss, TeacherSignal
from gpt2lab.settings import LossSettings


@dataclass(frozen=True)
class AlignedText:
    """A batch's text as tokens of a teacher with a different tokenizer (tokenizer_alignment.py).

    Shapes: B sequences, U teacher tokens, M = B·U; N = B·T student positions.
    """

    input_ids: Tensor  # (B, U) int64, padded on the right
    labels: Tensor  # (M,) int64: next token; IGNORE_INDEX unless all of its bytes belong to student targets
    teacher_positions: Tensor  # (N,) int64 in [0, M): position that predicts from the same byte on; −1: none
    label_bytes: int  # bytes of `labels`; a special token counts as one byte
    target_bytes: int  # bytes of the student's targets, counted likewise

    def to(self, device: torch.device) -> "AlignedText":
        """Return a copy on a device."""
        tensors = {name: vars(self)[name].to(device) for name in ("input_ids", "labels", "teacher_positions")}
        return replace(self, **tensors)


@dataclass(frozen=True)
class AlignedTeacher(TeacherSignal):
    """Online teacher with a different tokenizer; matched where tokens of both models begin at the same byte."""

    hidden: Tensor  # (M, Dt)
    weight: Tensor  # (W, Dt)
    teacher_positions: Tensor  # (N,) int64, as in AlignedText
    text: AlignedText

    @property
    def rows(self) -> int:
        return len(self.teacher_positions)

    @property
    def matched(self) -> Tensor:
        return self.teacher_positions >= 0

    def select(self, positions: Tensor) -> Self:
        return replace(self, teacher_positions=self.teacher_positions[positions])

    def reader(self, vocab_size: int, head_of: Callable[[Tensor], Head]) -> Callable[[slice], TeacherChunk]:
        head = head_of(self.weight)

        def read(rows: slice) -> TeacherChunk:
            positions = self.teacher_positions[rows]
            return head(self.hidden[positions.clamp_min(0)]), positions >= 0

        return read

    @staticmethod
    def term(
        chunk: TeacherChunk, student: Distribution, temperature: float, distance: Divergence
    ) -> tuple[Tensor, Tensor]:
        """Return the ULD, the only divergence across two vocabularies; 0 at positions that are not matched."""
        logits, matched = chunk  # (C, W), (C,)
        return universal_logit_distance(softmax(logits, temperature), student, matched)

    @classmethod
    def check(cls, loss: LossSettings) -> None:
        if loss.name != "uld":
            raise ValueError(
                f"loss={loss.name} needs the student's tokenizer, and this teacher has another; use loss=uld."
            )

    def loss(self, labels: Tensor, vocab_size: int) -> TeacherLoss:
        """Return the cross-entropy on the teacher's tokens within the student's targets, in units of bytes."""
        targets = self.text.labels != IGNORE_INDEX
        nats = target_losses(self.hidden[targets], self.weight, self.text.labels[targets])
        return TeacherLoss(nats.sum(), self.text.label_bytes, self.text.target_bytes)

    def in_fp32(self) -> Self:
        return replace(self, hidden=self.hidden.float(), weight=self.weight.float())
