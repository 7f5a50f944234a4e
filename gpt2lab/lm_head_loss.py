"""LM-head loss: hidden states + head weight + targets → loss sum, chunk by chunk, without the whole batch's logits.

Shapes: N positions (B·T flattened), D hidden width, V vocabulary, C rows of one chunk.

Each chunk's logits (C, V) live only while that chunk is worked on. Its gradient with respect to the logits is known in
closed form, so it is formed at once and turned into the gradients of the hidden states and of the head weight; backward
then only scales those two. Cross-entropy and the teacher's divergence share the student's one pass over the chunk.

Gradients per position, with q, p the student's and teacher's probabilities and y the label:
    cross-entropy   q − 1_y
    forward KL      T² · (q_T − p_T) / T, with both distributions at temperature T; without T² where scale_t2 is off
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gpt2lab.batch import IGNORE_INDEX
from gpt2lab.settings import LossSettings

LOGITS_OF_A_CHUNK = 2**26  # fewer and larger matrix products are faster; this many take 128 MiB in bf16


@dataclass(frozen=True)
class DenseTeacher:
    """A teacher given by what its own head would multiply; the width Dt may differ from the student's."""

    hidden: Tensor  # (N, Dt)
    weight: Tensor  # (V, Dt)


@dataclass(frozen=True)
class LMHeadLoss:
    """Sums over the target positions, in nats. Divide by the global number of targets, not by `tokens` of this call."""

    total: Tensor  # () carries the gradient
    tokens: Tensor  # () int64: positions that count
    cross_entropy: Tensor  # () detached
    divergence: Tensor  # () detached, with T² where scale_t2; 0 without a teacher


def lm_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    teacher: DenseTeacher | None = None,
    loss: LossSettings | None = None,
    ignore_index: int = IGNORE_INDEX,
    chunk_rows: int | None = None,
    compiled: bool = False,
) -> LMHeadLoss:
    """Cross-entropy, or hard_weight · cross-entropy + (1 − hard_weight) · forward KL(teacher ‖ student).

    The result does not depend on `chunk_rows`. Under autocast the matrix products run in its dtype; probabilities,
    losses and the accumulated weight gradient stay in fp32. Second derivatives are not available.

    Args:
        hidden: (N, D) student hidden states after the final layer norm.
        weight: (V, D) student head.
        labels: (N,) int64; `ignore_index` marks positions that count neither as loss nor as token.
        teacher: needs `loss`; without it the loss is plain cross-entropy.
        chunk_rows: C; by default as many as hold 2^26 logits, in chunks of one size.
        compiled: run the work on a chunk's logits through torch.compile.

    Raises:
        ValueError: a teacher without loss settings or with another vocabulary size, or shapes that do not fit.

    Source: closed-form softmax gradients; T² as in Hinton et al. 2015 (arXiv 1503.02531).
    """
    if hidden.shape[0] != labels.shape[0]:
        raise ValueError(f"hidden has {hidden.shape[0]} rows, labels {labels.shape[0]}; they must be equal.")
    if (teacher is None) != (loss is None):
        raise ValueError("teacher and loss settings belong together: give both or neither.")
    if teacher is not None and teacher.weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"teacher has {teacher.weight.shape[0]} entries, student {weight.shape[0]}: not one vocabulary."
        )
    kept = labels != ignore_index  # (N,)
    total, cross_entropy, divergence = _ChunkedLoss.apply(
        hidden,
        weight,
        labels,
        kept,
        teacher,
        loss or LossSettings("cross_entropy", hard_weight=1.0),
        chunk_rows or _even_chunks(hidden.shape[0], weight.shape[0]),
        compiled,
        torch.is_grad_enabled(),
    )
    return LMHeadLoss(total, kept.sum(), cross_entropy, divergence)


def _even_chunks(rows: int, vocab_size: int) -> int:
    chunks = -(-rows * vocab_size // LOGITS_OF_A_CHUNK)
    return -(-rows // max(chunks, 1)) or 1


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        kept: Tensor,
        teacher: DenseTeacher | None,
        loss: LossSettings,
        chunk_rows: int,
        compiled: bool,
        gradients_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        compute_dtype = _compute_dtype(hidden)
        head = weight.to(compute_dtype)  # (V, D)
        teacher_head = teacher.weight.to(compute_dtype) if teacher is not None else None  # (V, Dt)
        # needs_input_grad holds under no_grad too, where validation would pay for gradients that nobody asks for.
        hidden_needs_gradient, weight_needs_gradient = (
            gradients_enabled and needs for needs in ctx.needs_input_grad[:2]
        )
        accumulate_dtype = torch.promote_types(torch.float32, weight.dtype)
        sums = torch.zeros(2, dtype=accumulate_dtype, device=hidden.device)
        needs_gradient = hidden_needs_gradient or weight_needs_gradient
        hidden_gradient = torch.empty_like(hidden) if hidden_needs_gradient else None
        weight_gradient: Tensor | None = None

        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            chunk = hidden[rows].to(compute_dtype)  # (C, D)
            logits = chunk @ head.T  # (C, V)
            if teacher is None or teacher_head is None:
                chunk_sums, gradient = _chunk_function(_cross_entropy_chunk, compiled)(
                    logits, labels[rows], kept[rows], needs_gradient
                )
            else:
                teacher_logits = teacher.hidden[rows].to(compute_dtype) @ teacher_head.T  # (C, V)
                mix = (loss.hard_weight, loss.temperature, loss.scale_t2)
                chunk_sums, gradient = _chunk_function(_forward_kl_chunk, compiled)(
                    logits, teacher_logits, labels[rows], kept[rows], *mix, needs_gradient
                )
            sums += chunk_sums
            if hidden_gradient is not None:
                hidden_gradient[rows] = gradient @ head
            if weight_needs_gradient:
                product = gradient.T @ chunk  # (V, D)
                weight_gradient = (
                    product.to(accumulate_dtype) if weight_gradient is None else weight_gradient.add_(product)
                )
        if weight_needs_gradient and weight_gradient is None:  # no rows at all
            weight_gradient = torch.zeros_like(weight, dtype=accumulate_dtype)

        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        cross_entropy, divergence = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return loss.hard_weight * cross_entropy + (1 - loss.hard_weight) * divergence, cross_entropy, divergence

    @staticmethod
    def backward(ctx: Any, total_gradient: Tensor, *_of_detached: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        if hidden_gradient is not None:
            hidden_gradient = (hidden_gradient * total_gradient).to(hidden_gradient.dtype)
        if weight_gradient is not None:
            weight_gradient = (weight_gradient * total_gradient).to(ctx.weight_dtype)
        return hidden_gradient, weight_gradient, None, None, None, None, None, None, None


def _cross_entropy_chunk(
    logits: Tensor, labels: Tensor, kept: Tensor, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """(C, V), (C,), (C,) → sums (2,) [cross-entropy, 0] and the gradient (C, V) in the logits' dtype, where needed."""
    safe_labels = torch.where(kept, labels, 0).unsqueeze(1)  # (C, 1)
    log_q = _log_softmax(logits)
    cross_entropy = torch.where(kept, -log_q.gather(1, safe_labels).squeeze(1), 0.0).sum()
    sums = torch.stack([cross_entropy, torch.zeros_like(cross_entropy)])
    if not needs_gradient:
        return sums, None
    gradient = _subtract_at_labels(log_q.exp_(), safe_labels, 1.0).mul_(kept.unsqueeze(1))
    return sums, gradient.to(logits.dtype)


def _forward_kl_chunk(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    kept: Tensor,
    hard_weight: float,
    temperature: float,
    scale_t2: bool,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """(C, V) twice, (C,), (C,) → sums (2,) [cross-entropy, forward KL] and the mixed gradient (C, V), where needed."""
    safe_labels = torch.where(kept, labels, 0).unsqueeze(1)  # (C, 1)
    scale = temperature**2 if scale_t2 else 1.0
    log_q1 = _log_softmax(logits)
    log_q = log_q1 if temperature == 1.0 else _log_softmax(logits / temperature)
    log_p = _log_softmax(teacher_logits / temperature)
    p = log_p.exp()
    # A teacher logit of −inf has p = 0 and log p = −inf: its term is 0, not NaN.
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1) * scale  # (C,)
    cross_entropy = torch.where(kept, -log_q1.gather(1, safe_labels).squeeze(1), 0.0).sum()
    sums = torch.stack([cross_entropy, torch.where(kept, kl, 0.0).sum()])
    if not needs_gradient:
        return sums, None
    gradient = log_q.exp().sub_(p).mul_((1 - hard_weight) * scale / temperature)
    gradient = gradient.add_(log_q1.exp(), alpha=hard_weight)
    gradient = _subtract_at_labels(gradient, safe_labels, hard_weight).mul_(kept.unsqueeze(1))
    return sums, gradient.to(logits.dtype)


def _subtract_at_labels(gradient: Tensor, labels: Tensor, weight: float) -> Tensor:
    """gradient (C, V) − weight · one-hot(labels (C, 1)), in place where it is not compiled."""
    if torch.compiler.is_compiling():  # fuses with its neighbours; a scatter would split the kernel in two
        columns = torch.arange(gradient.shape[1], device=gradient.device)
        return gradient - weight * (columns == labels)
    return gradient.scatter_add_(1, labels, torch.full_like(labels, -weight, dtype=gradient.dtype))


def _log_softmax(logits: Tensor) -> Tensor:
    """(C, V) → (C, V), at least in fp32."""
    return torch.log_softmax(logits.to(torch.promote_types(torch.float32, logits.dtype)), dim=-1)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


@cache
def _chunk_function(function: Callable, compiled: bool) -> Callable:
    return torch.compile(function) if compiled else function
