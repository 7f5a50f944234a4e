"""Divergences of a student's distribution from a teacher's, each with its gradient in closed form.

Shapes: C positions, V entries. `log_p` and `log_q` (C, V) are the log-probabilities of teacher and student at the
loss's temperature, in fp32 or more. Each function gives the loss (C,) in nats and its gradient (C, V) with respect to
the logits whose softmax q is.

The gradient of a loss L(q) is g = ∂L/∂q taken through the softmax: q · (g − Σ q g). Where g stays bounded it vanishes
as q does, so reverse KL, JSD, skew reverse KL and TVD teach a student little about what it rules out itself; begin with
forward KL or skew KL.

A probability below e^−87 (fp32's smallest normal number) counts as that, so no loss is infinite where a teacher rules
entries out.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gpt2lab.settings import LossSettings

SMALLEST_LOG = -87.0
SMALLEST = math.exp(SMALLEST_LOG)
# Divergences that draws from the teacher can estimate without bias: those linear in p
LINEAR_IN_TEACHER = ("forward_kl",)

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def divergence(loss: LossSettings, mixing: Tensor | None = None) -> Divergence:
    """The function (log_p, log_q) → (loss (C,), gradient (C, V)) that the settings name.

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
            return partial(skew_kl, alpha=loss.alpha)
        case "skew_reverse_kl":
            return partial(skew_reverse_kl, alpha=loss.alpha)
        case "tvd":
            return total_variation
        case "taid":
            return partial(interpolated, mixing=1.0 if mixing is None else mixing)
        case "mse":
            return centred_logit_mse
        case _:
            raise ValueError(f"loss={loss.name}: no such divergence.")


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Σ p (log p − log q)."""
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(1), log_q.exp() - p


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Σ q (log q − log p)."""
    q, ratio = log_q.exp(), log_q - log_p
    return (q * ratio).sum(1), _through_softmax(q, ratio)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q, as in GKD (arXiv 2306.13649)."""
    p, q = log_p.exp(), log_q.exp()
    log_m = _safe_log(beta * p + (1 - beta) * q)
    ratio = log_q - log_m
    loss = (beta * p * (log_p - log_m) + (1 - beta) * q * ratio).sum(1)
    return loss, _through_softmax(q, (1 - beta) * ratio)


def skew_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(p ‖ α p + (1 − α) q), DistiLLM (arXiv 2402.03898)."""
    p, q = log_p.exp(), log_q.exp()
    m = (alpha * p + (1 - alpha) * q).clamp_min(SMALLEST)
    return (p * (log_p - m.log())).sum(1), _through_softmax(q, (alpha - 1) * p / m)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(q ‖ (1 − α) p + α q), DistiLLM (arXiv 2402.03898)."""
    p, q = log_p.exp(), log_q.exp()
    m = ((1 - alpha) * p + alpha * q).clamp_min(SMALLEST)
    ratio = log_q - m.log()
    return (q * ratio).sum(1), _through_softmax(q, ratio - alpha * q / m)


def total_variation(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """½ Σ |p − q|: one minus the acceptance of speculative decoding (DistillSpec, arXiv 2310.08461)."""
    q = log_q.exp()
    difference = q - log_p.exp()
    return difference.abs().sum(1) / 2, _through_softmax(q, difference.sign() / 2)


def interpolated(log_p: Tensor, log_q: Tensor, mixing: Tensor | float) -> tuple[Tensor, Tensor]:
    """KL(r ‖ q) with r = softmax((1 − t) log q + t log p) taken as constant: TAID (arXiv 2501.16937)."""
    return forward_kl(torch.log_softmax((1 - mixing) * log_q + mixing * log_p, dim=1), log_q)


def centred_logit_mse(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the vocabulary of (z_s − z_t)², both logits less their mean, since a constant in them means nothing."""
    difference = log_q - log_p
    difference = difference - difference.mean(1, keepdim=True)
    return difference.square().mean(1), difference * (2 / difference.shape[1])


def _through_softmax(q: Tensor, by_q: Tensor) -> Tensor:
    """∂L/∂q (C, V) → ∂L/∂logits (C, V)."""
    return q * (by_q - (q * by_q).sum(1, keepdim=True))


def _safe_log(probability: Tensor) -> Tensor:
    return probability.clamp_min(SMALLEST).log()
