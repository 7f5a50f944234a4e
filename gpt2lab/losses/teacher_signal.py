"""Teacher signal: the forms in which a teacher's next-token distributions reach the LM-head loss.

Shapes: N positions, Dt the teacher's hidden width, V vocabulary, K stored entries of one position.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class DenseTeacher:
    """A teacher given by what its own head would multiply; the width Dt may differ from the student's."""

    hidden: Tensor  # (N, Dt)
    weight: Tensor  # (V, Dt)


@dataclass(frozen=True)
class TopKTeacher:
    """The K most likely entries at the loss's temperature, and the probability of all others together.

    Without `logs` a probability of 0 counts as the smallest number of its dtype.
    """

    ids: Tensor  # (N, K) int64, no entry twice in a row
    probabilities: Tensor  # (N, K)
    tail: Tensor  # (N,) probability of all other entries; 0 where the K were scaled to sum to 1
    logs: Tensor | None = None  # (N, K + 1) log-probabilities of the K and of all others, exact where those underflow

    @property
    def class_logs(self) -> Tensor:
        """(N, K + 1) log-probabilities of the K entries and of all others together; −inf where these have none."""
        if self.logs is not None:
            return self.logs
        given = torch.finfo(self.probabilities.dtype)
        top = self.probabilities.to(torch.promote_types(torch.float32, self.probabilities.dtype)).log()  # (N, K)
        tail = self.tail.to(top.dtype).clamp_min(0).log().unsqueeze(1)  # (N, 1)
        return torch.cat([top.clamp_min(math.log(given.tiny) + math.log(given.eps)), tail], dim=1)

    def select(self, rows: slice) -> "TopKTeacher":
        """The teacher at these positions only."""
        logs = self.logs[rows] if self.logs is not None else None
        return TopKTeacher(self.ids[rows], self.probabilities[rows], self.tail[rows], logs)


@dataclass(frozen=True)
class SampledTeacher:
    """K independent draws from the teacher's distribution at the loss's temperature; an entry may be drawn often.

    Source: random-sampling distillation, arXiv 2503.16870. Its estimate of the forward KL has no bias.
    """

    ids: Tensor  # (N, K) int64
    entropy: Tensor  # (N,) nats, of the whole distribution: turns the cross-entropy to the draws into a KL


@dataclass(frozen=True)
class AlignedText:
    """The text of a batch in the tokens of a teacher that has another tokenizer (tokenizer_alignment.py).

    Shapes: B sequences, U of the teacher's tokens, M = B·U; N = B·T positions of the student.
    """

    input_ids: Tensor  # (B, U) int64, padded on the right
    labels: Tensor  # (M,) int64: the token that follows; IGNORE_INDEX where it is not all within the targets
    places: Tensor  # (N,) int64 in 0 … M − 1: which position predicts at the same byte of the text; −1: none
    label_bytes: int  # that `labels` spell, a special token counting as one
    target_bytes: int  # that the student's targets spell, likewise

    def to(self, device: torch.device) -> "AlignedText":
        """The same on a device."""
        tensors = {name: vars(self)[name].to(device) for name in ("input_ids", "labels", "places")}
        return replace(self, **tensors)


@dataclass(frozen=True)
class AlignedTeacher:
    """A teacher with a vocabulary of its own; it speaks where both tokenizers begin a token at the same byte."""

    hidden: Tensor  # (M, Dt) at its own positions
    weight: Tensor  # (W, Dt) W: its own vocabulary
    places: Tensor  # (N,) int64, as of the text
    text: AlignedText


TeacherSignal = DenseTeacher | TopKTeacher | SampledTeacher | AlignedTeacher
