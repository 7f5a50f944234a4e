"""Sampled softmax: cross-entropy over the target and a few negative samples instead of the whole vocabulary.

Shapes: N rows, D hidden width, V vocabulary size, S negatives.

The logit of each negative is lowered by the logarithm of its expected count (logQ correction). The expected sum of the
exponentials then equals the sum over all tokens but the target, and the gradient tends to that of the full softmax as S
grows. All rows of a step share the same distinct negatives; a negative that is a row's own target is masked in that
row.

Source: Jean et al. 2015, arXiv 1412.2007; Bengio & Senécal 2008.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2lab.data.batch import IGNORE_INDEX
from gpt2lab.losses.lm_head_loss import LMHeadLoss

POWER = 0.75  # of the unigram distribution (Mikolov et al. 2013, arXiv 1310.4546)


def log_uniform(vocab_size: int) -> Tensor:
    """Return probabilities (V,) log(1 + 1 / (v + 1)) / log(V + 1), for tokens ordered by frequency, as in a BPE."""
    ids = torch.arange(vocab_size, dtype=torch.float64)
    return ((ids + 2) / (ids + 1)).log() / math.log(vocab_size + 1)


def unigram(counts: Tensor) -> Tensor:
    """Return probabilities (V,) ∝ count^0.75; a count of 0 is replaced by 1."""
    weights = counts.double().clamp_min(1) ** POWER
    return weights / weights.sum()


class NegativeSampler:
    """Sampler of a step's negatives.

    Args:
        probabilities: (V,) sampling distribution.
        count: S, the number of distinct negatives, below V.
        seed: seed of the run.
        device: of `log_expected`, (V,) fp32: the logarithm of each token's expected count.
    """

    def __init__(self, probabilities: Tensor, count: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.probabilities = probabilities
        self.count = count
        self.seed = seed
        # Sampling without replacement is close to as many independent draws as `count` distinct tokens take.
        draws = _expected_draws(probabilities, count)
        self.log_expected = torch.log(-torch.expm1(draws * torch.log1p(-probabilities))).to(device, torch.float32)

    def sample(self, step: int) -> Tensor:
        """Return (S,) token ids in ascending order, a pure function of (seed, step): the same on every rank."""
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + step) % 2**63)
        # Gumbel-top-k trick: the largest values of log p + Gumbel noise are a sample without replacement.
        noise = torch.empty_like(self.probabilities).exponential_(generator=generator)
        return (self.probabilities / noise).topk(self.count).indices.sort().values


def _expected_draws(probabilities: Tensor, count: int) -> float:
    """Return the number of independent draws with `count` distinct tokens in expectation, by bisection."""
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
    """Compute the cross-entropy over each row's target and the negatives, summed over the rows with a target.

    Args:
        hidden: (N, D) hidden states after the final layer norm.
        weight: (V, D) head.
        labels: (N,) int64, or IGNORE_INDEX.
        negatives: (S,) distinct token ids.
        log_expected: (V,) logarithm of each token's expected count among the negatives.
    """
    kept, labels = labels != IGNORE_INDEX, labels.clamp_min(0)  # a selection of rows would wait for a GPU
    target_logits = (hidden * F.embedding(labels, weight)).sum(1, dtype=torch.float32)  # (N,)
    negative_logits = (hidden @ F.embedding(negatives, weight).T).float() - log_expected[negatives]  # (N, S)
    negative_logits = negative_logits.masked_fill(labels[:, None] == negatives, -math.inf)
    nats = torch.logaddexp(target_logits, negative_logits.logsumexp(1)) - target_logits  # (N,)
    total = nats.masked_fill(~kept, 0.0).sum()
    return LMHeadLoss(total, kept.sum(), total.detach(), torch.zeros_like(total))
