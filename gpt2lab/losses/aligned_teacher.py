"""Aligned teacher: an online teacher with another tokenizer, and the batch's text in its tokens.

Shapes: N positions of the student, M of the teacher, C positions of one chunk, Dt the teacher's hidden width, W its
vocabulary.
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
    """A batch's text in the tokens of a teacher that has another tokenizer (tokenizer_alignment.py).

    Shapes: B sequences, U of the teacher's tokens, M = B·U; N = B·T positions of the student.
    """

    input_ids: Tensor  # (B, U) int64, padded on the right
    labels: Tensor  # (M,) int64: the token that follows; IGNORE_INDEX where it is not all within the targets
    places: Tensor  # (N,) int64 in 0 … M − 1: which position predicts at the same byte of the text; −1: none
    label_bytes: int  # that `labels` spell, a special token counting as one
    target_bytes: int  # that the student's targets spell, likewise

    def to(self, device: torch.device) -> "AlignedText":
        """Return the same text on a device."""
        tensors = {name: vars(self)[name].to(device) for name in ("input_ids", "labels", "places")}
        return replace(self, **tensors)


@dataclass(frozen=True)
class AlignedTeacher(TeacherSignal):
    """Online teacher with another tokenizer; it has a distribution where tokens of both begin at the same byte."""

    hidden: Tensor  # (M, Dt) at its own positions
    weight: Tensor  # (W, Dt) W: its own vocabulary
    places: Tensor  # (N,) int64, as in the text
    text: AlignedText

    @property
    def rows(self) -> int:
        return len(self.places)

    @property
    def matched(self) -> Tensor:
        return self.places >= 0

    def select(self, positions: Tensor) -> Self:
        return replace(self, places=self.places[positions])

    def reader(self, vocab_size: int, head_of: Callable[[Tensor], Head]) -> Callable[[slice], TeacherChunk]:
        head = head_of(self.weight)

        def read(rows: slice) -> TeacherChunk:
            places = self.places[rows]
            return head(self.hidden[places.clamp_min(0)]), places >= 0

        return read

    @staticmethod
    def term(
        chunk: TeacherChunk, student: Distribution, temperature: float, distance: Divergence
    ) -> tuple[Tensor, Tensor]:
        """ULD, the one divergence between two vocabularies; 0 where the teacher has no matching position."""
        logits, matched = chunk  # (C, W), (C,)
        return universal_logit_distance(softmax(logits, temperature), student, matched)

    @classmethod
    def check(cls, loss: LossSettings) -> None:
        if loss.name != "uld":
            raise ValueError(
                f"loss={loss.name} compares entry by entry, and this teacher's are other tokens; use loss=uld."
            )

    def loss(self, labels: Tensor, vocab_size: int) -> TeacherLoss:
        """Cross-entropy on the teacher's own tokens within the student's targets; the units are bytes."""
        targets = self.text.labels != IGNORE_INDEX
        nats = target_losses(self.hidden[targets], self.weight, self.text.labels[targets])
        return TeacherLoss(nats.sum(), self.text.label_bytes, self.text.target_bytes)

    def in_fp32(self) -> Self:
        return replace(self, hidden=self.hidden.float(), weight=self.weight.float())
