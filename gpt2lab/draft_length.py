"""Draft length: decides token by token how long a draft of speculative decoding is, and learns from what is kept."""

from dataclasses import dataclass, field

LEVELS = 5  # of how sure the draft model is
PRIOR = 4  # drafts that each level's rate of acceptance starts with


@dataclass
class DraftLength:
    """Whether a draft goes on, token by token.

    With a_i the chance that token i is kept where all before it were, a draft of K tokens is expected to bring
    N = 1 + a_1 + a_1 a_2 + … tokens at a cost of C = 1 + K c target steps. N / C is largest where the next token's part
    of N falls below c N / C, since these parts only become smaller. a_i is the share that was kept of drafts of which
    the draft model was as sure, in five levels of its largest probability; each level starts with that probability as
    if it had been seen in four drafts. No decision looks at the token drawn last, so that none favours some tokens.

    Attributes:
        cost: c, of a draft's step and of a target's look at one token more.
    """

    cost: float
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
        following = reached * sum(self.kept) / sum(self.tried)
        return following > self.cost * expected / (1 + self.cost * len(self.levels))

    def learn(self, kept: int) -> None:
        """From the draft that ended: its first `kept` tokens were kept, and nobody knows of those after the next."""
        for number, level in enumerate(self.levels[: kept + 1]):
            self.tried[level] += 1
            self.kept[level] += number < kept
        self.levels = []
