"""Chunk losses: loss sums of one chunk's logits; the gradient with respect to the logits overwrites them.

Shapes: C positions, V vocabulary size.
Sums are (3,): objective, cross-entropy, divergence, over the kept positions.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from gpt2lab.losses.divergences import Distribution, Divergence, divergence, softmax
from gpt2lab.losses.teacher_signal import TeacherChunk
from gpt2lab.settings import CrossEntropySettings, LossSettings

# (logits (C, V), labels (C,), kept (C,), teacher chunk, TAID's teacher share) → sums; the gradient overwrites logits
ChunkFunction = Callable[[Tensor, Tensor, Tensor, TeacherChunk, Tensor | None], Tensor]
# `TeacherSignal.term`: (teacher chunk, student, temperature, divergence) → divergence (C,), its gradient (C, V)
SoftTerm = Callable[[TeacherChunk, Distribution, float, Divergence], tuple[Tensor, Tensor]]


@cache
def chunk_function(
    term: SoftTerm | None, loss: LossSettings | None, hard: CrossEntropySettings, needs_gradient: bool, compiled: bool
) -> ChunkFunction:
    """Return the function for one chunk: cross-entropy, or a mixture with the teacher's term.

    Without `needs_gradient` it leaves the logits unchanged.
    """
    work = partial(_hard_chunk, hard, needs_gradient)
    if term is not None and loss is not None:
        work = partial(_mixed_chunk, term, loss, hard, needs_gradient)
    return torch.compile(work) if compiled else work


def _hard_chunk(
    hard: CrossEntropySettings,
    needs_gradient: bool,
    logits: Tensor,
    labels: Tensor,
    kept: Tensor,
    teacher: TeacherChunk,
    mixing: Tensor | None,
) -> Tensor:
    """Compute the cross-entropy alone."""
    safe_labels = torch.where(kept, labels, 0).unsqueeze(1)  # (C, 1)
    student = softmax(logits)
    cross_entropy, objective = _hard_losses(student, safe_labels, hard)
    sums = _sums(kept, objective, cross_entropy, torch.zeros_like(cross_entropy))
    if needs_gradient:
        logits.copy_(_hard_gradient(student, safe_labels, hard, 1.0).mul_(kept.unsqueeze(1)))
    return sums


def _mixed_chunk(
    term: SoftTerm,
    loss: LossSettings,
    hard: CrossEntropySettings,
    needs_gradient: bool,
    logits: Tensor,
    labels: Tensor,
    kept: Tensor,
    teacher: TeacherChunk,
    mixing: Tensor | None,
) -> Tensor:
    """Compute hard_weight · cross-entropy + (1 − hard_weight) · divergence."""
    temperature, soft_weight = loss.temperature, 1 - loss.hard_weight
    scale = temperature**2 if loss.scale_t2 else 1.0
    safe_labels = torch.where(kept, labels, 0).unsqueeze(1)  # (C, 1)
    student = softmax(logits)
    tempered = student if temperature == 1.0 else softmax(logits, temperature)
    distance, gradient = term(teacher, tempered, temperature, divergence(loss, mixing))
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
    """Return the reported cross-entropy (C,) and the training loss (C,) with label smoothing and z-loss."""
    cross_entropy = -student.log_at(labels).squeeze(1)
    trained = cross_entropy
    if hard.label_smoothing:
        mean_log = student.scores.mean(1) - student.total.log().squeeze(1)
        trained = (1 - hard.label_smoothing) * cross_entropy - hard.label_smoothing * mean_log
    if hard.z_loss:
        trained = trained + hard.z_loss * student.log_normalizer.square().squeeze(1)
    return cross_entropy, trained


def _hard_gradient(student: Distribution, labels: Tensor, hard: CrossEntropySettings, weight: float) -> Tensor:
    """Return weight · (q − (1 − ε) 1_y − ε / V + 2 c lse q), (C, V)."""
    gradient = student.value
    if hard.z_loss:
        gradient = gradient * (1 + 2 * hard.z_loss * student.log_normalizer)
    if hard.label_smoothing:
        gradient = gradient - hard.label_smoothing / gradient.shape[1]
    return _subtract_at_labels(weight * gradient, labels, weight * (1 - hard.label_smoothing))


def _subtract_at_labels(gradient: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Return gradient (C, V) − weight · one-hot(labels (C, 1)); in place unless compiled."""
    if torch.compiler.is_compiling():  # pointwise, so the compiler fuses it; a scatter would split the kernel
        columns = torch.arange(gradient.shape[1], device=gradient.device)
        return torch.where(columns == labels, gradient - weight, gradient)  # the weight in the dtype of the gradient
    return gradient.scatter_add_(1, labels, torch.full_like(labels, -weight, dtype=gradient.dtype))


def _sums(kept: Tensor, *losses: Tensor) -> Tensor:
    """Sum each loss (C,) over the kept positions."""
    return torch.stack([torch.where(kept, loss, 0.0).sum() for loss in losses])
