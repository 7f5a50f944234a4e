"""Acceptance: how often speculative decoding keeps a student's draft, measured by drawing, and the speed-up it implies.

Shapes: C positions, V vocabulary.

Speculative decoding draws x from the draft model's q and keeps it with probability min(1, p(x) / q(x)), where p is the
target model's distribution. The expected share that is kept is Σ min(p, q) = 1 − TVD. Here q is the student and p the
teacher, and contexts are those of the scored text, not the student's own writing.

Source: Leviathan, Kalman, Matias 2023, Fast Inference from Transformers via Speculative Decoding (arXiv 2211.17192).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpt2lab.settings import ModelShape
from gpt2lab.storage.model_folder import matmul_parameter_count
from gpt2lab.system.device import flops_per_token

ACCEPTED, DRAW_VARIANCE = "accepted", "draw_variance"  # names of the sums
MOST_DRAFTS = 16


@dataclass(frozen=True)
class Speculation:
    """What speculative decoding would gain from a student as draft model and its teacher as target model.

    Attributes:
        acceptance: expected share of drafts that are kept, 1 − TVD.
        acceptance_measured: share that was kept of one draft drawn at each position.
        acceptance_standard_error: of `acceptance_measured`, the text taken as given.
        cost_ratio: cost of a draft step over that of a target step.
        drafts: how many tokens the student best drafts before the teacher looks at them, of 1 to 16.
        tokens_per_target_call: expected tokens gained for one look.
        speedup: over the teacher alone, in expected time per token.
        tokens_per_target_call_standard_error, speedup_standard_error: over texts, with so many drafts; None where there
            is a single row of text.
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


def drawn_sums(log_q: Tensor, log_p: Tensor, uniforms: Tensor) -> dict[str, Tensor]:
    """Draw x ~ q at each position and keep it or not; how many were kept, and the variance of that number.

    Args:
        log_q, log_p: (C, V) log-probabilities of draft and target model.
        uniforms: (C, 2) independent numbers in [0, 1): the first chooses x, the second whether it is kept.
    """
    q = log_q.exp()
    cumulated = q.cumsum(1)  # (C, V)
    point = uniforms[:, :1].to(q.dtype) * cumulated[:, -1:]
    drawn = torch.searchsorted(cumulated, point, right=True).clamp_max(q.shape[1] - 1)  # (C, 1)
    kept = is_kept(log_p.gather(1, drawn), log_q.gather(1, drawn), uniforms[:, 1:])
    expected = torch.minimum(q, log_p.exp()).sum(1)  # (C,)
    return {ACCEPTED: kept.sum(), DRAW_VARIANCE: (expected * (1 - expected)).sum().clamp_min(0)}


def is_kept(log_p: Tensor, log_q: Tensor, uniform: Tensor) -> Tensor:
    """Whether drafts with these log-probabilities are kept: with probability min(1, p / q)."""
    return uniform < (log_p - log_q).exp()


def speculation(acceptance: float, sums: dict[str, Tensor], draws: int, ratio: float) -> Speculation:
    """Put together what is known.

    Args:
        acceptance: 1 − TVD.
        sums: of `drawn_sums`, over `draws` positions.
        ratio: cost of a draft step over that of a target step.
    """
    drafts = max(range(1, MOST_DRAFTS + 1), key=lambda drafts: speedup(acceptance, drafts, ratio))
    return Speculation(
        acceptance=acceptance,
        acceptance_measured=sums[ACCEPTED].item() / draws,
        acceptance_standard_error=sums[DRAW_VARIANCE].item() ** 0.5 / draws,
        cost_ratio=ratio,
        drafts=drafts,
        tokens_per_target_call=tokens_per_target_call(acceptance, drafts),
        speedup=speedup(acceptance, drafts, ratio),
    )


def with_error(found: Speculation, tokens_error: float) -> Speculation:
    """The same with the standard error of its tokens per call, and that of the speed-up, whose costs are exact."""
    cost = found.drafts * found.cost_ratio + 1
    return replace(
        found, tokens_per_target_call_standard_error=tokens_error, speedup_standard_error=tokens_error / cost
    )


def tokens_per_target_call(acceptance: float, drafts: int) -> float:
    """(1 − α^(γ + 1)) / (1 − α) = 1 + α + … + α^γ with γ drafts: those kept, and one of the target's own."""
    return sum(acceptance**kept for kept in range(drafts + 1))


def speedup(acceptance: float, drafts: int, ratio: float) -> float:
    """Tokens per target call over its cost, γ · c + 1 steps of the target model.

    Like the paper it takes a look at γ + 1 tokens to cost what one step costs, which holds while memory traffic, not
    arithmetic, bounds the target model.
    """
    return tokens_per_target_call(acceptance, drafts) / (drafts * ratio + 1)


def cost_ratio(draft: ModelShape, target: ModelShape, length: int) -> float:
    """FLOPs of a token in the draft model over those in the target model.

    The weights a step must read, which bound decoding one token at a time, stand in nearly the same ratio; what a small
    model loses to launching its kernels is not counted.
    """
    costs = [
        flops_per_token(matmul_parameter_count(vars(shape)), shape.n_layer, shape.n_embd, length)
        for shape in (draft, target)
    ]
    return costs[0] / costs[1]
