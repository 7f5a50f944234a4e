"""Acceptance: rate at which speculative decoding accepts a student's draft tokens, and the speed-up it implies.

Shapes: C positions, V vocabulary size.

Speculative decoding samples x from the draft model's q and accepts it with probability min(1, p(x) / q(x)), where p is
the target model's distribution. The expected acceptance rate is Σ min(p, q) = 1 − TVD. Here q is the student and p the
teacher. Contexts are those of the scored text, not of the student's own generations.

Source: Leviathan, Kalman, Matias 2023, Fast Inference from Transformers via Speculative Decoding (arXiv 2211.17192).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2lab.settings import ModelShape
from gpt2lab.storage.model_folder import matmul_parameter_count
from gpt2lab.system.device import flops_per_token

ACCEPTED, DRAW_VARIANCE = "accepted", "draw_variance"  # names of the sums
MOST_DRAFTS = 16


@dataclass(frozen=True)
class Speculation:
    """Estimated gain of speculative decoding with the student as draft model and its teacher as target model.

    Attributes:
        acceptance: expected acceptance rate, 1 − TVD.
        acceptance_measured: acceptance rate of one sampled draft token per position.
        acceptance_standard_error: sampling error of `acceptance_measured`, for fixed text.
        cost_ratio: cost of a draft step divided by the cost of a target step.
        drafts: best number of draft tokens per verification pass, from 1 to 16.
        tokens_per_target_call: expected tokens per verification pass.
        speedup: expected, in time per token, relative to the teacher alone.
        tokens_per_target_call_standard_error, speedup_standard_error: between texts, for this number of drafts; None
            for a single document.
    """

    acceptance: float
    acceptance_measured: float
    acceptance_standard_error: float
    cost_ratio: float
    drafts: int
    tokens_per_target_call: float
    speedup: float
    tokens_per_target_call_standard_error: float | None = None
    speedup_standard_error: float | None = None


def acceptance_sums(log_q: Tensor, log_p: Tensor, uniforms: Tensor) -> dict[str, Tensor]:
    """Sample x ~ q at each position; return the number of accepted samples and the variance of that number.

    Args:
        log_q, log_p: (C, V) log-probabilities of draft and target model.
        uniforms: (C, 2) independent numbers in [0, 1): one to sample x, one to accept or reject it.
    """
    q = log_q.exp()
    cumulative = q.cumsum(1)  # (C, V)
    point = uniforms[:, :1].to(q.dtype) * cumulative[:, -1:]
    samples = torch.searchsorted(cumulative, point, right=True).clamp_max(q.shape[1] - 1)  # (C, 1)
    accepted = is_accepted(log_p.gather(1, samples), log_q.gather(1, samples), uniforms[:, 1:])
    expected = torch.minimum(q, log_p.exp()).sum(1)  # (C,)
    return {ACCEPTED: accepted.sum(), DRAW_VARIANCE: (expected * (1 - expected)).sum().clamp_min(0)}


def is_accepted(log_p: Tensor, log_q: Tensor, uniform: Tensor) -> Tensor:
    """Accept drafts with these log-probabilities with probability min(1, p / q)."""
    return uniform < (log_p - log_q).exp()


def estimate_speculation(acceptance: float, sums: dict[str, Tensor], samples: int, ratio: float) -> Speculation:
    """Estimate the gain of speculative decoding from its acceptance rate and costs.

    Args:
        acceptance: 1 − TVD.
        sums: result of `acceptance_sums` over `samples` positions.
        ratio: cost of a draft step divided by the cost of a target step.
    """
    drafts = max(range(1, MOST_DRAFTS + 1), key=lambda drafts: speedup(acceptance, drafts, ratio))
    return Speculation(
        acceptance=acceptance,
        acceptance_measured=sums[ACCEPTED].item() / samples,
        acceptance_standard_error=sums[DRAW_VARIANCE].item() ** 0.5 / samples,
        cost_ratio=ratio,
        drafts=drafts,
        tokens_per_target_call=tokens_per_target_call(acceptance, drafts),
        speedup=speedup(acceptance, drafts, ratio),
    )


def tokens_per_target_call(acceptance: float, drafts: int) -> float:
    """Expected accepted drafts plus one token of the target: (1 − α^(γ + 1)) / (1 − α) = 1 + α + … + α^γ, γ drafts."""
    return sum(acceptance**count for count in range(drafts + 1))


def speedup(acceptance: float, drafts: int, ratio: float) -> float:
    """Tokens per target call divided by the cost of γ drafts and a verification pass, γ · c + 1 target steps.

    As in the paper, verifying γ + 1 tokens costs as much as one step. This holds while the target model is bound by
    memory bandwidth, not by arithmetic.
    """
    return tokens_per_target_call(acceptance, drafts) / (drafts * ratio + 1)


def cost_ratio(draft: ModelShape, target: ModelShape, length: int) -> float:
    """FLOPs per token of the draft model divided by those of the target model.

    Memory traffic, which bounds single-token decoding, has nearly the same ratio. The kernel-launch overhead of a small
    model is not counted.
    """
    costs = [
        flops_per_token(matmul_parameter_count(vars(shape)), shape.n_layer, shape.n_embd, length)
        for shape in (draft, target)
    ]
    return costs[0] / costs[1]
