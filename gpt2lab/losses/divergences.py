"""Divergences of a student's distribution from a teacher's, each with its gradient in closed form.

Shapes: C positions, V entries. Each function takes the distributions p of the teacher and q of the student at the
loss's temperature, and gives the loss (C,) in nats and its gradient (C, V) with respect to the logits whose softmax q
is.

The gradient of a loss L(q) is g = ∂L/∂q taken through the softmax: q · (g − Σ q g). Where g stays bounded it vanishes
as q does, so reverse KL, JSD, skew reverse KL, TVD and ULD teach a student little about what it rules out itself; begin
with forward KL or skew KL.

Logarithms come from the logits, never from the probabilities, so they are exact however small a probability is. A logit
of −inf counts as 1e4 below the largest one, so a loss that is infinite there stays a number.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2lab.losses.sorted_l1 import sorted_difference
from gpt2lab.settings import DIVERGENCES, LossSettings

RULED_OUT = -1e4  # a logit of −inf, less the largest logit
# The smallest exponent whose exponential is a normal fp32 number: below it a CPU's exp takes fifty times as long.
SMALLEST_LOG = -87.0
SMALLEST = math.exp(SMALLEST_LOG)
# Divergences that draws from the teacher can estimate without bias: those linear in p
LINEAR_IN_TEACHER = ("forward_kl",)


class Distribution(NamedTuple):
    """Distribution over the vocabulary at each of C positions, in fp32 or more: probabilities are weights / total.

    Weights and total stay apart: a compiled loss that sums before it normalises reads the logits once less.
    """

    scores: Tensor  # (C, V) logits less the largest one, finite
    weights: Tensor  # (C, V) their exponentials, at least e^−87
    total: Tensor  # (C, 1) sum of the weights
    largest: Tensor | float = 0.0  # (C, 1) the largest logit

    @property
    def log(self) -> Tensor:
        """(C, V) log-probabilities."""
        return self.scores - self.total.log()

    @property
    def value(self) -> Tensor:
        """(C, V) probabilities."""
        return self.weights * (1 / self.total)

    @property
    def log_normaliser(self) -> Tensor:
        """(C, 1) logsumexp of the logits."""
        return self.largest + self.total.log()

    def log_at(self, entries: Tensor) -> Tensor:
        """(C, K) log-probabilities of the entries (C, K)."""
        return self.scores.gather(1, entries) - self.total.log()

    def mean(self, of: Tensor) -> Tensor:
        """Expectation (C, 1) of what has a value at each entry (C, V)."""
        return (self.weights * of).sum(1, keepdim=True) / self.total


Divergence = Callable[[Distribution, Distribution], tuple[Tensor, Tensor]]


def divergence(loss: LossSettings, mixing: Tensor | None = None) -> Divergence:
    """The function (teacher, student) → (loss (C,), gradient (C, V)) that the settings name.

    Args:
        mixing: () TAID's share of the teacher at this step, which grows during training.

    Raises:
        ValueError: no divergence of this name.
    """
    match loss.name:
        case "forward_kl":
            return forward_kl
        case "reverse_kl":
            return reverse_kl
        case "jsd":
            # The endpoints are the limits that GKD defines; the formula itself would give 0 there.
            return {0.0: forward_kl, 1.0: reverse_kl}.get(loss.beta, partial(jensen_shannon, beta=loss.beta))
        case "skew_kl":
            return partial(skew_kl, alpha=loss.alpha) if loss.alpha else forward_kl
        case "skew_reverse_kl":
            return partial(skew_reverse_kl, alpha=loss.alpha) if loss.alpha else reverse_kl
        case "tvd":
            return total_variation
        case "taid":
            return partial(interpolated, mixing=1.0 if mixing is None else mixing)
        case "mse":
            return centred_logit_mse
        case "uld":
            return universal_logit_distance
        case added if added in DIVERGENCES.added:
            return with_gradient(DIVERGENCES.added[added])
        case _:
            raise ValueError(f"loss={loss.name}: no such divergence.")


@cache
def with_gradient(function: Callable[[Distribution, Distribution], Tensor | tuple[Tensor, Tensor]]) -> Divergence:
    """Return a divergence of the user with its gradient: the function's own, or from autograd, chunk by chunk.

    Args:
        function: from teacher and student to the loss (C,), or to loss and gradient (C, V).
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
    """Softmax of logits (C, V) / temperature over the vocabulary, computed in fp32 or more."""
    logits = logits.to(torch.promote_types(torch.float32, logits.dtype))
    if temperature != 1.0:
        logits = logits / temperature
    largest = logits.amax(1, keepdim=True)
    scores = finite(logits - largest)
    weights = scores.clamp_min(SMALLEST_LOG).exp_()
    return Distribution(scores, weights, weights.sum(1, keepdim=True), largest)


def finite(scores: Tensor) -> Tensor:
    """Scores or log-probabilities with RULED_OUT in place of −inf; all other values unchanged."""
    # One comparison: compiled, nan_to_num makes three, in every loop over the vocabulary.
    return torch.where(scores == -math.inf, RULED_OUT, scores)


def forward_kl(teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
    """Σ p (log p − log q): the mean under p of the difference of logits, less that of their log-normalisers."""
    difference = teacher.mean(teacher.scores - student.scores) - teacher.total.log() + student.total.log()
    return difference.squeeze(1), student.value - teacher.value


def reverse_kl(teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
    """Σ q (log q − log p)."""
    ratio = student.scores - teacher.scores
    mean = student.mean(ratio)
    return (mean - student.total.log() + teacher.total.log()).squeeze(1), student.value * (ratio - mean)


def jensen_shannon(teacher: Distribution, student: Distribution, beta: float) -> tuple[Tensor, Tensor]:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q, as in GKD (arXiv 2306.13649)."""
    log_m = (beta * teacher.value + (1 - beta) * student.value).clamp_min(SMALLEST).log()
    ratio = student.log - log_m
    loss = (beta * teacher.value * (teacher.log - log_m) + (1 - beta) * student.value * ratio).sum(1)
    return loss, _through_softmax(student.value, (1 - beta) * ratio)


def skew_kl(teacher: Distribution, student: Distribution, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(p ‖ α p + (1 − α) q), DistiLLM (arXiv 2402.03898)."""
    m = (alpha * teacher.value + (1 - alpha) * student.value).clamp_min(SMALLEST)
    loss = (teacher.value * (teacher.log - m.log())).sum(1)
    return loss, _through_softmax(student.value, (alpha - 1) * teacher.value / m)


def skew_reverse_kl(teacher: Distribution, student: Distribution, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(q ‖ (1 − α) p + α q), DistiLLM (arXiv 2402.03898)."""
    m = ((1 - alpha) * teacher.value + alpha * student.value).clamp_min(SMALLEST)
    ratio = student.log - m.log()
    return (student.value * ratio).sum(1), _through_softmax(student.value, ratio - alpha * student.value / m)


def total_variation(teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
    """½ Σ |p − q|: one minus the acceptance of speculative decoding (DistillSpec, arXiv 2310.08461)."""
    difference = student.value - teacher.value
    return difference.abs().sum(1) / 2, _through_softmax(student.value, difference.sign() / 2)


def interpolated(teacher: Distribution, student: Distribution, mixing: Tensor | float) -> tuple[Tensor, Tensor]:
    """KL(r ‖ q) with r = softmax((1 − t) log q + t log p) taken as constant: TAID (arXiv 2501.16937)."""
    return forward_kl(softmax((1 - mixing) * student.log + mixing * teacher.log), student)


def centred_logit_mse(teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
    """Mean over the vocabulary of (z_s − z_t)², both logits less their mean, since a constant in them means nothing."""
    difference = student.log - teacher.log
    difference = difference - difference.mean(1, keepdim=True)
    return difference.square().mean(1), difference * (2 / difference.shape[1])


def universal_logit_distance(
    teacher: Distribution, student: Distribution, matched: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Σ |q_(i) − p_(i)|, both sorted in descending order, the shorter padded with zeros: ULD (arXiv 2402.12030).

    It compares how the probability is shared out, not which entries have it, so the vocabularies need not be one.

    Args:
        matched: (C,) bool; elsewhere the teacher says nothing, and loss and gradient are 0.
    """
    if matched is None:
        matched = torch.ones_like(student.total[:, 0], dtype=torch.bool)
    loss, signs = sorted_difference(student.value, teacher.value, matched)
    return loss, _through_softmax(student.value, signs)


def _through_softmax(q: Tensor, by_q: Tensor) -> Tensor:
    """∂L/∂q (C, V) → ∂L/∂logits (C, V)."""
    return q * (by_q - (q * by_q).sum(1, keepdim=True))
