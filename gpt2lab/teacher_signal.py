"""Teacher signal: the forms in which a teacher's next-token distributions reach the LM-head loss.

Shapes: N positions, Dt the teacher's hidden width, V vocabulary, K stored entries of one position.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DenseTeacher:
    """A teacher given by what its own head would multiply; the width Dt may differ from the student's."""

    hidden: Tensor  # (N, Dt)
    weight: Tensor  # (V, Dt)


@dataclass(frozen=True)
class TopKTeacher:
    """The K most likely entries, taken at the loss's temperature, and what all others have together."""

    ids: Tensor  # (N, K) int64, no entry twice in a row
    probabilities: Tensor  # (N, K)
    tail: Tensor  # (N,) probability of all other entries; 0 where the K were scaled to sum to 1


@dataclass(frozen=True)
class SampledTeacher:
    """K independent draws from the teacher's distribution at the loss's temperature; an entry may be drawn often.

    Source: random-sampling distillation, arXiv 2503.16870. Its estimate of the forward KL has no bias.
    """

    ids: Tensor  # (N, K) int64
    entropy: Tensor  # (N,) nats, of the whole distribution: turns the cross-entropy to the draws into a KL


TeacherSignal = DenseTeacher | TopKTeacher | SampledTeacher
