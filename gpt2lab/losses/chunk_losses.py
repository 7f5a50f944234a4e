"""Logit losses: from logits to their loss sums, and in place of the logits the gradient with respect to them.

Shapes: C positions, V vocabulary, K stored entries of a top-k or sampled teacher.
Sums are (3,): objective, cross-entropy, divergence, over the positions that are kept.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from gpt2lab.losses.divergences import (
    SMALLEST_LOG,
    Distribution,
    Divergence,
    divergence,
    softmax,
    universal_logit_distance,
)
from gpt2lab.losses.teacher_signal import AlignedTeacher, DenseTeacher, SampledTeacher, TopKTeacher
from gpt2lab.settings import CrossEntropySettings, LossSettings

ABSENT = -1e20  # in place of a logit: below every real one, and finite where no entry is left

# (logits (C, V), labels (C,), kept (C,), what the teacher says, TAID's mixing) → sums; the logits become their gradient
ChunkFunction = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, ...], Tensor | None], Tensor]


@cache
def chunk_function(
    teacher: type, loss: LossSettings | None, hard: CrossEntropySettings, needs_gradient: bool, compiled: bool
) -> ChunkFunction:
    """The work on logits for a form of teacher, or NoneType and no loss settings for plain cross-entropy.

    Logits stay as they are where no gradient is needed.
    """
    work = partial(_hard_chunk, hard, needs_gradient)
    if loss is not None:
        work = partial(_mixed_chunk, teacher, loss, hard, needs_gradient)
    return torch.compile(work) if compiled else work


def _hard_chunk(
    hard: CrossEntropySettings,
    needs_gradient: bool,
    logits: Tensor,
    labels: Tensor,
    kept: Tensor,
    teacher: tuple[Tensor, ...],
    mixing: Tensor | None,
) -> Tensor:
    """Cross-entropy alone."""
    safe_labels = torch.where(kept, labels, 0).unsqueeze(1)  # (C, 1)
    student = softmax(logits)
    cross_entropy, objective = _hard_losses(student, safe_labels, hard)
    sums = _sums(kept, objective, cross_entropy, torch.zeros_like(cross_entropy))
    if needs_gradient:
        logits.copy_(_hard_gradient(student, safe_labels, hard, 1.0).mul_(kept.unsqueeze(1)))
    return sums


def _mixed_chunk(
    teacher_kind: type,
    loss: LossSettings,
    hard: CrossEntropySettings,
    needs_gradient: bool,
    logits: Tensor,
    labels: Tensor,
    kept: Tensor,
    teacher: tuple[Tensor, ...],
    mixing: Tensor | None,
) -> Tensor:
    """hard_weight · cross-entropy + (1 − hard_weight) · divergence."""
    temperature, soft_weight = loss.temperature, 1 - loss.hard_weight
    scale = temperature**2 if loss.scale_t2 else 1.0
    safe_labels = torch.where(kept, labels, 0).unsqueeze(1)  # (C, 1)
    student = softmax(logits)
    tempered = student if temperature == 1.0 else softmax(logits, temperature)
    distance, gradient = SOFT_TERMS[teacher_kind](tempered, teacher, temperature, divergence(loss, mixing))
    distance = scale * distance
    cross_entropy, hard_loss = _hard_losses(student, safe_labels, hard)
    sums = _sums(kept, loss.hard_weight * hard_loss + soft_weight * distance, cross_entropy, distance)
    if needs_gradient:
        gradient = gradient * (soft_weight * scale / temperature)
        if loss.hard_weight:
            gradient = gradient + _hard_gradient(student, safe_labels, hard, loss.hard_weight)
        logits.copy_(gradient.mul_(kept.unsqueeze(1)))
    return sums


def _hard_losses(student: Distribution, labels: Tensor, hard: CrossEntropySettings) -> tuple[Tensor, Tensor]:
    """Cross-entropy (C,) as it is reported, and with label smoothing and z-loss as it is trained."""
    cross_entropy = -student.log_at(labels).squeeze(1)
    trained = cross_entropy
    if hard.label_smoothing:
        mean_log = student.scores.mean(1) - student.total.log().squeeze(1)
        trained = (1 - hard.label_smoothing) * cross_entropy - hard.label_smoothing * mean_log
    if hard.z_loss:
        trained = trained + hard.z_loss * student.log_normaliser.square().squeeze(1)
    return cross_entropy, trained


def _hard_gradient(student: Distribution, labels: Tensor, hard: CrossEntropySettings, weight: float) -> Tensor:
    """weight · (q − (1 − ε) 1_y − ε / V + 2 c lse q), (C, V)."""
    gradient = student.value
    if hard.z_loss:
        gradient = gradient * (1 + 2 * hard.z_loss * student.log_normaliser)
    if hard.label_smoothing:
        gradient = gradient - hard.label_smoothing / gradient.shape[1]
    return _subtract_at_labels(weight * gradient, labels, weight * (1 - hard.label_smoothing))


def _dense_term(
    student: Distribution, teacher: tuple[Tensor, ...], temperature: float, distance: Divergence
) -> tuple[Tensor, Tensor]:
    (teacher_logits,) = teacher  # (C, V)
    return distance(softmax(teacher_logits, temperature), student)


def _top_k_term(
    student: Distribution, teacher: tuple[Tensor, ...], temperature: float, distance: Divergence
) -> tuple[Tensor, Tensor]:
    """Divergence over K entries and one bucket for all others, whose logit is the logsumexp of theirs.

    The bucket's gradient reaches its entries in proportion to their share of it. They have a softmax of their own, for
    in that of the whole vocabulary all of them may underflow.
    """
    ids, logs = teacher  # (C, K), (C, K + 1)
    others = student.scores.scatter(1, ids, ABSENT)  # (C, V)
    largest = others.amax(1, keepdim=True)  # (C, 1)
    others = others.sub_(largest).clamp_min_(SMALLEST_LOG).exp_()
    total = others.sum(1, keepdim=True)  # (C, 1)
    classes = torch.cat([student.scores.gather(1, ids), largest + total.log()], dim=1)  # (C, K + 1)
    loss, gradient = distance(softmax(logs.to(classes.dtype)), softmax(classes))
    return loss, others.mul_(gradient[:, -1:] / total).scatter_(1, ids, gradient[:, :-1])


def _sampled_term(
    student: Distribution, teacher: tuple[Tensor, ...], temperature: float, distance: Divergence
) -> tuple[Tensor, Tensor]:
    """Forward KL estimated from draws: cross-entropy to the draws less the teacher's entropy."""
    ids, entropy = teacher  # (C, K), (C,)
    loss = -student.log_at(ids).mean(1) - entropy
    share = torch.full_like(ids, -1.0 / ids.shape[1], dtype=student.value.dtype)
    return loss, student.value.scatter_add(1, ids, share)


def _aligned_term(
    student: Distribution, teacher: tuple[Tensor, ...], temperature: float, distance: Divergence
) -> tuple[Tensor, Tensor]:
    """ULD, the one divergence between two vocabularies; 0 where the teacher has no position that fits."""
    teacher_logits, matched = teacher  # (C, W), (C,)
    return universal_logit_distance(softmax(teacher_logits, temperature), student, matched)


SOFT_TERMS = {
    DenseTeacher: _dense_term,
    TopKTeacher: _top_k_term,
    SampledTeacher: _sampled_term,
    AlignedTeacher: _aligned_term,
}


def _subtract_at_labels(gradient: Tensor, labels: Tensor, weight: float) -> Tensor:
    """gradient (C, V) − weight · one-hot(labels (C, 1)), in place where it is not compiled."""
    if torch.compiler.is_compiling():  # fuses with its neighbours; a scatter would split the kernel in two
        columns = torch.arange(gradient.shape[1], device=gradient.device)
        return gradient - weight * (columns == labels)
    return gradient.scatter_add_(1, labels, torch.full_like(labels, -weight, dtype=gradient.dtype))


def _sums(kept: Tensor, *losses: Tensor) -> Tensor:
    """Losses (C,) each → their sums over the kept positions."""
    return torch.stack([torch.where(kept, loss, 0.0).sum() for loss in losses])
