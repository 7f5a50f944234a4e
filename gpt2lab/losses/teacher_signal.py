"""Teacher signal: the interface between a teacher's next-token distributions and the losses and metrics.

Each kind of teacher is one subclass of `TeacherSignal` in one file: `DenseTeacher`, `TopKTeacher`, `SampledTeacher`,
`AlignedTeacher`. No other code depends on the kind.

Shapes: N positions, C positions of one chunk, D and Dt hidden widths of student and teacher, V vocabulary size, K
stored tokens of one position.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from gpt2lab.losses.divergences import Distribution, Divergence
from gpt2lab.losses.logit_chunks import Head
from gpt2lab.settings import LossSettings

TOP = 5  # tokens that the agreement metrics compare

TeacherChunk = tuple[Tensor, ...]  # a teacher's distributions at C rows, in the format of the class that created it


class Classes(NamedTuple):
    """A teacher's distribution over E classes: the V tokens, or K tokens and one class for all others."""

    log_p: Tensor  # (C, E) teacher's log-probabilities
    labels: Tensor  # (C,) class of each label
    top1: Tensor  # (C,) class of the teacher's top-1 token
    top5: Tensor  # (C, 5) the teacher's top-5 tokens, best first
    log_q: Tensor | None = None  # (C, E) student's log-probabilities; None: each class is a token


class TeacherLoss(NamedTuple):
    """A teacher's cross-entropy on a text: `nats` over `scored` of the text's `total` units (targets or bytes)."""

    nats: Tensor  # ()
    scored: int
    total: int

    @property
    def extrapolated(self) -> Tensor:
        """Estimated nats over the whole text, ()."""
        return self.nats.float() * (self.total / max(self.scored, 1))


class TeacherSignal(ABC):
    """A teacher's next-token distributions at N positions: all of a batch, or its targets only."""

    only_targets: ClassVar[bool] = False  # whether the rows are a batch's targets, in the order of its labels

    @property
    @abstractmethod
    def rows(self) -> int:
        """N."""

    @abstractmethod
    def select(self, positions: Tensor) -> Self:
        """Return the signal at these rows."""

    @abstractmethod
    def reader(self, vocab_size: int, head_of: Callable[[Tensor], Head]) -> Callable[[slice], TeacherChunk]:
        """Return a function that maps rows to their chunk.

        Args:
            vocab_size: vocabulary size of the softmax, from `shared_vocabulary`.
            head_of: maps a head weight (V, Dt) to the product with it.
        """

    @staticmethod
    @abstractmethod
    def term(
        chunk: TeacherChunk, student: Distribution, temperature: float, distance: Divergence
    ) -> tuple[Tensor, Tensor]:
        """Return the divergence (C,) and its gradient (C, V) with respect to the student's tempered logits."""

    @classmethod
    @abstractmethod
    def check(cls, loss: LossSettings) -> None:
        """Raise ValueError if this kind of teacher does not support the loss; the message names an alternative."""

    @staticmethod
    def classes(chunk: TeacherChunk, log_q: Tensor, labels: Tensor) -> Classes:
        """Return the distributions that the distillation metrics compare with a student's log-probabilities (C, V)."""
        raise ValueError("This kind of teacher has no distribution over the student's tokens to compare with.")

    def loss(self, labels: Tensor, vocab_size: int) -> TeacherLoss:
        """Return the teacher's cross-entropy on the labels (N,), none of which is ignored."""
        raise ValueError("This kind of teacher has no log-probability of the labels.")

    def shared_vocabulary(self, vocab_size: int) -> int:
        """Return the number of tokens in the softmax, at most the student's `vocab_size`."""
        return vocab_size

    def at_targets(self, targets: Tensor) -> Self:
        """Return the signal at a batch's targets, whose positions (targets,) are in ascending order."""
        return self if self.only_targets or len(targets) == self.rows else self.select(targets)

    def equals(self, other: Self) -> bool:
        """Return whether both hold the same tensors."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return all(torch.equal(one, same) for one, same in pairs if isinstance(one, Tensor))

    def in_fp32(self) -> Self:
        """Return the same signal, computing logits in fp32."""
        return self

    @property
    def matched(self) -> Tensor:
        """Mask (N,) of the positions at which the teacher has a distribution."""
        return torch.ones(self.rows, dtype=torch.bool)

    @property
    def hidden_states(self) -> Tensor:
        """Last hidden states (N, Dt), for the hidden-state losses."""
        raise ValueError("This kind of teacher has no hidden states; leave out loss.hidden_cosine and loss.hidden_mse.")


def token_classes(log_p: Tensor, labels: Tensor, top5: Tensor) -> Classes:
    """Return one class per token: teacher's log-probabilities (C, V), labels (C,), top-5 tokens (C, 5)."""
    return Classes(log_p, labels, top5[:, 0], top5)


def top_tokens(scores: Tensor) -> Tensor:
    """Return the top-5 tokens, best first: (C, V) → (C, 5)."""
    return scores.topk(min(TOP, scores.shape[1]), dim=1).indices


def log_softmax(logits: Tensor) -> Tensor:
    """Compute the log-softmax of (C, V) in fp32 or wider."""
    return torch.log_softmax(logits.to(torch.promote_types(torch.float32, logits.dtype)), dim=1)
