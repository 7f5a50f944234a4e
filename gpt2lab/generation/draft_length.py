"""Adaptive draft length of speculative decoding, from the acceptance of earlier drafts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

LEVELS = 5  # confidence levels of the draft model
PRIOR = 4  # pseudo-observations with which each level's acceptance rate starts


@dataclass
class DraftLength:
    """Decision, token by token, whether to extend the draft.

    Let a_i be the probability that token i is accepted if all before it are. A draft of K tokens yields an expected
    N = 1 + a_1 + a_1 a_2 + … tokens at a cost of C = K c + verify(K + 1) target steps. The draft is extended while any
    longer one has a larger expected N / C; a single further token may not, where verification cost jumps at that
    length.

    a_i is the acceptance rate of earlier drafted tokens with similar confidence: five levels of the draft model's
    largest probability, each with a prior of four observations. For tokens not drafted yet it is the overall rate. The
    decision does not depend on the token sampled last, so that no tokens are favoured.

    Attributes:
        step: c, cost of a draft model's step.
        verify: cost of verifying 1, 2, … tokens; the longest draft has one token less.
        tried: per level, drafted tokens that were verified.
        kept: per level, accepted ones.
    """

    step: float
    verify: Sequence[float]
    tried: list[float] = field(default_factory=lambda: [PRIOR] * LEVELS)
    kept: list[float] = field(default_factory=lambda: [PRIOR * (level + 0.5) / LEVELS for level in range(LEVELS)])
    levels: list[int] = field(default_factory=list)  # of the current draft

    def should_continue(self, largest: float) -> bool:
        """Whether to draft another token.

        Args:
            largest: largest probability of the draft model for the token just drafted.
        """
        self.levels.append(min(int(largest * LEVELS), LEVELS - 1))
        reached, expected = 1.0, 1.0
        for level in self.levels:
            reached *= self.kept[level] / self.tried[level]
            expected += reached
        drafted, mean_rate = len(self.levels), sum(self.kept) / sum(self.tried)
        rate = expected / self._cost(drafted)
        for longer in range(drafted + 1, len(self.verify)):
            reached *= mean_rate
            expected += reached
            if expected / self._cost(longer) > rate:
                return True
        return False

    def _cost(self, drafted: int) -> float:
        return drafted * self.step + self.verify[drafted]

    def update(self, kept: int) -> None:
        """Update the rates after a draft whose first `kept` tokens were accepted; those after the next are unknown."""
        for number, level in enumerate(self.levels[: kept + 1]):
            self.tried[level] += 1
            self.kept[level] += number < kept
        self.levels = []
