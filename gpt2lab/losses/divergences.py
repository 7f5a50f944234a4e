"""Divergences between the next-token distributions of teacher and student, each with its gradient in closed form.

Shapes: C positions, V vocabulary size. Each function receives the distributions p of the teacher and q of the student
at the loss's temperature. It returns the loss (C,) in nats and its gradient (C, V) with respect to the logits of q.

With g = ∂L/∂q, the gradient of a loss L(q) through the softmax is q · (g − Σ q g). Where g is bounded, it vanishes with
q. So reverse KL, JSD, skew reverse KL, TVD and ULD have almost no gradient at tokens to which the student assigns
almost no probability. Begin with forward KL or skew KL.

Log-probabilities are computed from logits, so they are exact even where a probability underflows. A logit of −inf is
replaced by 1e4 below the largest logit, so that losses stay finite.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2lab.losses.sorted_l1 import sorted_difference
from gpt2lab.settings import DIVERGENCES, LossSettings

MASKED_SCORE = -1e4  # replaces −inf as the difference from the largest logit
# Smallest exponent whose exponential is a normal fp32 number; below it, exp on a CPU takes fifty times as long.
SMALLEST_LOG = -87.0
SMALLEST = math.exp(SMALLEST_LOG)
# Divergences with an unbiased estimate from samples of the teacher: those linear in p
LINEAR_IN_TEACHER = ("forward_kl",)


class Distribution(NamedTuple):
    """Distributions over the vocabulary at C positions, in fp32 or wider; probabilities are weights / total.

    The division is left to the caller: a compiled loss that sums before it normalizes reads the logits once less.
    """

    scores: Tensor  # (C, V) logits minus the largest one, finite
    weights: Tensor  # (C, V) exponentials of the scores, at least e^−87
    total: Tensor  # (C, 1) sum of the weights
    largest: Tensor | float = 0.0  # (C, 1) the largest logit

    @property
    def log(self) -> Tensor:
        """Log-probabilities (C, V)."""
        return self.scores - self.total.log()

    @property
    def value(self) -> Tensor:
        """Probabilities (C, V)."""
        return self.weights * (1 / self.total)

    @property
    def log_normalizer(self) -> Tensor:
        """Logsumexp of the logits, (C, 1)."""
        return self.largest + self.total.log()

    def log_at(self, tokens: Tensor) -> Tensor:
        """Return the log-probabilities (C, K) of tokens (C, K)."""
        return self.scores.gather(1, tokens) - self.total.log()

    def mean(self, values: Tensor) -> Tensor:
        """Return the expectation (C, 1) of values (C, V) under this distribution."""
        return (self.weights * values).sum(1, keepdim=True) / self.total


Divergence = Callable[[Distribution, Distribution], tuple[Tensor, Tensor]]


def divergence(loss: LossSettings, mixing: Tensor | None = None) -> Divergence:
    """Return the function (teacher, student) → (loss (C,), gradient (C, V)) for these settings.

    Args:
        mixing: () TAID's teacher share at this step; it grows during training.

    Raises:
        ValueError: the divergence is unknown.
    """
    match loss.name:
        case "forward_kl":
            return forward_kl
        case "reverse_kl":
            return reverse_kl
        case "jsd":
            # GKD defines these limits for the endpoints, where the formula itself is 0.
            return {0.0: forward_kl, 1.0: reverse_kl}.get(loss.beta, partial(jensen_shannon, beta=loss.beta))
        case "skew_kl":
            return partial(skew_kl, alpha=loss.alpha) if loss.alpha else forward_kl
        case "skew_reverse_kl":
            return partial(skew_reverse_kl, alpha=loss.alpha) if loss.alpha else reverse_kl
        case "tvd":
            return total_variation
        case "taid":
            return partial(interpolated_kl, mixing=1.0 if mixing is None else mixing)
        case "mse":
            return centred_logit_mse
        case "uld":
            return universal_logit_distance
        case name if name in DIVERGENCES.added:
            return with_gradient(DIVERGENCES.added[name])
        case _:
            raise ValueError(f"loss={loss.name} is not a known divergence.")


@cache
def with_gradient(function: Callable[[Distribution, Distribution], Tensor | tuple[Tensor, Tensor]]) -> Divergence:
    """Return a user-defined divergence with its gradient: the function's own, or from autograd, chunk by chunk.

    Args:
        function: maps teacher and student to the loss (C,), or to loss and gradient (C, V).
    """
    is_closed_form = True  # until the function returns no gradient

    def divergence(teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
        nonlocal is_closed_form
        if is_closed_form:
            found = function(teacher, student)
            if isinstance(found, tuple):
                return found
            is_closed_form = False
        with torch.enable_grad():
            scores = student.scores.detach().requires_grad_()
            weights = scores.clamp_min(SMALLEST_LOG).exp()
            loss = function(teacher, Distribution(scores, weights, weights.sum(1, keepdim=True), student.largest))
            assert isinstance(loss, Tensor)
            (gradient,) = torch.autograd.grad(loss.sum(), scores)
        return loss.detach(), gradient

    return torch.compiler.disable(divergence)


def softmax(logits: Tensor, temperature: float = 1.0) -> Distribution:
    """Compute the softmax of logits (C, V) / temperature over the vocabulary, in fp32 or wider."""
    logits = logits.to(torch.promote_types(torch.float32, logits.dtype))
    if temperature != 1.0:
        logits = logits / temperature
    largest = logits.amax(1, keepdim=True)
    scores = finite(logits - largest)
    weights = scores.clamp_min(SMALLEST_LOG).exp_()
    return Distribution(scores, weights, weights.sum(1, keepdim=True), largest)


def finite(scores: Tensor) -> Tensor:
    """Replace −inf in scores or log-probabilities by MASKED_SCORE; all other values are unchanged."""
    # A single comparison; compiled, nan_to_num makes three in every loop over the vocabulary.
    return torch.where(scores == -math.inf, MASKED_SCORE, scores)


def forward_kl(teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
    """Forward KL, Σ p (log p − log q): the mean of the logit difference under p, minus that of the log-normalizers."""
    difference = teacher.mean(teacher.scores - student.scores) - teacher.total.log() + student.total.log()
    return difference.squeeze(1), student.value - teacher.value


def reverse_kl(teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
    """Reverse KL, Σ q (log q − log p)."""
    ratio = student.scores - teacher.scores
    mean = student.mean(ratio)
    return (mean - student.total.log() + teacher.total.log()).squeeze(1), student.value * (ratio - mean)


def jensen_shannon(teacher: Distribution, student: Distribution, beta: float) -> tuple[Tensor, Tensor]:
    """JSD, β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q, as in GKD (arXiv 2306.13649)."""
    log_m = (beta * teacher.value + (1 - beta) * student.value).clamp_min(SMALLEST).log()
    ratio = student.log - log_m
    loss = (beta * teacher.value * (teacher.log - log_m) + (1 - beta) * student.value * ratio).sum(1)
    return loss, _through_softmax(student.value, (1 - beta) * ratio)


def skew_kl(teacher: Distribution, student: Distribution, alpha: float) -> tuple[Tensor, Tensor]:
    """Skew KL, KL(p ‖ α p + (1 − α) q), DistiLLM (arXiv 2402.03898)."""
    m = (alpha * teacher.value + (1 - alpha) * student.value).clamp_min(SMALLEST)
    loss = (teacher.value * (teacher.log - m.log())).sum(1)
    return loss, _through_softmax(student.value, (alpha - 1) * teacher.value / m)


def skew_reverse_kl(teacher: Distribution, student: Distribution, alpha: float) -> tuple[Tensor, Tensor]:
    """Skew reverse KL, KL(q ‖ (1 − α) p + α q), DistiLLM (arXiv 2402.03898)."""
    m = ((1 - alpha) * teacher.value + alpha * student.value).clamp_min(SMALLEST)
    ratio = student.log - m.log()
    return (student.value * ratio).sum(1), _through_softmax(student.value, ratio - alpha * student.value / m)


def total_variation(teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
    """TVD, ½ Σ |p − q|: one minus the acceptance rate of speculative decoding (DistillSpec, arXiv 2310.08461)."""
    difference = student.value - teacher.value
    return difference.abs().sum(1) / 2, _through_softmax(student.value, difference.sign() / 2)


def interpolated_kl(teacher: Distribution, student: Distribution, mixing: Tensor | float) -> tuple[Tensor, Tensor]:
    """TAID, KL(r ‖ q) with r = softmax((1 − t) log q + t log p) held constant (arXiv 2501.16937)."""
    return forward_kl(softmax((1 - mixing) * student.log + mixing * teacher.log), student)


def centred_logit_mse(teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
    """Mean over the vocabulary of (z_s − z_t)²; both logits are centred, since softmax ignores a constant."""
    difference = student.log - teacher.log
    difference = difference - difference.mean(1, keepdim=True)
    return difference.square().mean(1), difference * (2 / difference.shape[1])


def universal_logit_distance(
    teacher: Distribution, student: Distribution, matched: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """ULD, Σ |q_(i) − p_(i)|, both sorted in descending order, the shorter padded with zeros (arXiv 2402.12030).

    Token ids are not compared, so the two vocabularies may differ.

    Args:
        matched: (C,) bool; where False the teacher has no distribution, and loss and gradient are 0.
    """
    if matched is None:
        matched = torch.ones_like(student.total[:, 0], dtype=torch.bool)
    loss, signs = sorted_difference(student.value, teacher.value, matched)
    return loss, _through_softmax(student.value, signs)


def _through_softmax(q: Tensor, gradient: Tensor) -> Tensor:
    """Convert ∂L/∂q (C, V) to ∂L/∂logits (C, V)."""
    return q * (gradient - (q * gradient).sum(1, keepdim=True))
