"""Sampled softmax: cross-entropy over the target and a few drawn entries instead of the whole vocabulary.

Shapes: N rows, D hidden width, V vocabulary, S drawn entries.

The logit of each drawn entry is lowered by the logarithm of how often it is expected to be drawn. So the expected sum
of their exponentials is that over all entries but the target, which is always there, and the gradient tends to that of
the full softmax as S grows. All rows of a step share the drawn entries, which are all different, and where one of them
is a row's own target it counts only as that.

Source: Jean et al. 2015, arXiv 1412.2007; Bengio & Senécal 2008.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2lab.data.batch import IGNORE_INDEX
from gpt2lab.losses.lm_head_loss import LMHeadLoss

POWER = 0.75  # of the unigram distribution (Mikolov et al. 2013, arXiv 1310.4546)


def log_uniform(entries: int) -> Tensor:
    """(V,) probabilities log(1 + 1 / (v + 1)) / log(V + 1): for entries numbered from frequent to rare, as in a BPE."""
    numbers = torch.arange(entries, dtype=torch.float64)
    return ((numbers + 2) / (numbers + 1)).log() / math.log(entries + 1)


def unigram(counts: Tensor) -> Tensor:
    """(V,) probabilities ∝ count^0.75; an entry that was never counted is taken as counted once."""
    weights = counts.double().clamp_min(1) ** POWER
    return weights / weights.sum()


class NegativeSampler:
    """Draws the entries of a step.

    Args:
        probabilities: (V,) of one draw.
        count: how many different entries, below V.
        seed: of the run.
    """

    def __init__(self, probabilities: Tensor, count: int, seed: int) -> None:
        self.probabilities = probabilities
        self.count = count
        self.seed = seed
        # Drawing without repetition until `count` differ is close to so many independent draws with repetition.
        self.log_expected = torch.log(-torch.expm1(_draws_for(probabilities, count) * torch.log1p(-probabilities)))

    def of_step(self, step: int) -> Tensor:
        """(S,) entries in ascending order, a pure function of (seed, step): the same on every rank."""
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + step) % 2**63)
        # The Gumbel-top-k trick: the largest of log p + Gumbel noise are a draw without repetition.
        noise = torch.empty_like(self.probabilities).exponential_(generator=generator)
        return (self.probabilities / noise).topk(self.count).indices.sort().values


def _draws_for(probabilities: Tensor, count: int) -> float:
    """With how many independent draws `count` different entries are expected; by bisection."""
    low, high = float(count), float(count)
    log_rest = torch.log1p(-probabilities)

    def expected(draws: float) -> float:
        return float(-torch.expm1(draws * log_rest).sum())

    while expected(high) < count:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) < count else (low, middle)
    return high


def sampled_softmax_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, negatives: Tensor, log_expected: Tensor
) -> LMHeadLoss:
    """Cross-entropy over each row's target and the negatives, summed over the rows that have a target.

    Args:
        hidden: (N, D) hidden states after the final layer norm.
        weight: (V, D) head.
        labels: (N,) int64, or IGNORE_INDEX.
        negatives: (S,) different entries.
        log_expected: (V,) logarithm of how often each entry is expected among the negatives.
    """
    kept = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    hidden, labels = hidden[kept], labels[kept]
    of_target = (hidden * F.embedding(labels, weight)).sum(1, dtype=torch.float32)  # (N,)
    others = (hidden @ F.embedding(negatives, weight).T).float() - log_expected[negatives]  # (N, S)
    others = others.masked_fill(labels[:, None] == negatives, -math.inf)
    total = (torch.logaddexp(of_target, others.logsumexp(1)) - of_target).sum()
    return LMHeadLoss(total, torch.tensor(len(labels)), total.detach(), torch.zeros_like(total))
