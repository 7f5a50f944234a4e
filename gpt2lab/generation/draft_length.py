"""Draft length: decides token by token how long a draft of speculative decoding is, and learns from what is kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field

LEVELS = 5  # of how sure the draft model is
PRIOR = 4  # drafts that each level's rate of acceptance starts with


@dataclass
class DraftLength:
    """Whether a draft goes on, token by token.

    With a_i the chance that token i is kept where all before it were, a draft of K tokens is expected to bring
    N = 1 + a_1 + a_1 a_2 + … tokens at a cost of C = K c + look(K + 1) target steps. A draft goes on while any longer
    one is expected to have a larger N / C; one token more alone may not, where looks become dearer at that length.
    a_i is the share that was kept of drafts of which the draft model was as sure, in five levels of its largest
    probability; each level starts with that probability as if it had been seen in four drafts. Of tokens yet to be
    drafted it is the share of all. No decision looks at the token drawn last, so that none favours some tokens.

    Attributes:
        step: c, cost of a draft's step.
        looks: cost of the target's look at 1, 2, … tokens; the longest draft has one token less.
    """

    step: float
    looks: Sequence[float]
    tried: list[float] = field(default_factory=lambda: [PRIOR] * LEVELS)
    kept: list[float] = field(default_factory=lambda: [PRIOR * (level + 0.5) / LEVELS for level in range(LEVELS)])
    levels: list[int] = field(default_factory=list)  # of the present draft

    def goes_on(self, largest: float) -> bool:
        """Whether to draft another token.

        Args:
            largest: probability in the draft model where the token just drafted was chosen.
        """
        self.levels.append(min(int(largest * LEVELS), LEVELS - 1))
        reached, expected = 1.0, 1.0
        for level in self.levels:
            reached *= self.kept[level] / self.tried[level]
            expected += reached
        drafted, usual = len(self.levels), sum(self.kept) / sum(self.tried)
        rate = expected / self._cost(drafted)
        for longer in range(drafted + 1, len(self.looks)):
            reached *= usual
            expected += reached
            if expected / self._cost(longer) > rate:
                return True
        return False

    def _cost(self, drafted: int) -> float:
        return drafted * self.step + self.looks[drafted]

    def learn(self, kept: int) -> None:
        """From the draft that ended: its first `kept` tokens were kept, and nobody knows of those after the next."""
        for number, level in enumerate(self.levels[: kept + 1]):
            self.tried[level] += 1
            self.kept[level] += number < kept
        self.levels = []
