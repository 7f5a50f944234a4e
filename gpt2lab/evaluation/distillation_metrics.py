"""Distillation metrics: differences between the predictions of student and teacher, as sums over target positions.

Shapes: N positions, C positions of one chunk, D and Dt hidden widths of student and teacher, V vocabulary size, K
stored tokens of a position.

With q the student's and p the teacher's probabilities at temperature 1, the sums over positions are:
    losses              −log q_y and −log p_y at the label y
    KL, reverse KL      Σ p (log p − log q) and Σ q (log q − log p)
    TVD                 ½ Σ |p − q|; 1 − TVD is the acceptance rate of speculative decoding
    top-1, top-5        same top-1 token; share of the teacher's top-5 tokens among the student's
    entropies           −Σ q log q and −Σ p log p
    calibration         accuracy minus confidence, in 15 bins of the top-1 token's probability

A teacher that is stored as its top-K tokens is compared over K + 1 classes: these tokens, and all others merged into
one. On these classes both KLs, TVD and the teacher's entropy are lower bounds, so the acceptance 1 − TVD is an upper
bound. All other figures are exact, except the teacher's loss, which is unknown.

Sums add over chunks, batches and ranks; `figures` divides them once by the number of targets. Logits (C, V) exist only
while their chunk is processed, so no (N, V) tensor exists for student or teacher.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from gpt2lab import metric_names as names
from gpt2lab.data.batch import IGNORE_INDEX
from gpt2lab.data.document_groups import document_sums
from gpt2lab.evaluation.acceptance import acceptance_sums
from gpt2lab.losses.divergences import finite
from gpt2lab.losses.logit_chunks import even_chunk_rows, logit_chunks, plain_head
from gpt2lab.losses.teacher_signal import Classes, TeacherChunk, TeacherSignal, log_softmax, top_tokens
from gpt2lab.system.device import compute_dtype

LOGITS_OF_A_CHUNK = 2**25  # of one model; 64 MiB in bf16
LOGITS_OF_AN_UNCOMPILED_CHUNK = 2**22  # several matrices of this size exist at a time, in fp32
CALIBRATION_BINS = 15

STUDENT_CALIBRATION, TEACHER_CALIBRATION = "calibration_student", "calibration_teacher"  # names of (15,) sums
STUDENT_LOSSES = "losses_student"  # name of the student's cross-entropy at each target of a chunk, (C,)
OF_STUDENT = (names.VAL_LOSS, names.DISTILL_ENTROPY_STUDENT, STUDENT_CALIBRATION)
OF_TEACHER = (names.DISTILL_TEACHER_LOSS, names.DISTILL_ENTROPY_TEACHER, TEACHER_CALIBRATION)

MEANS = (
    names.VAL_LOSS,
    names.DISTILL_TEACHER_LOSS,
    names.DISTILL_KL,
    names.DISTILL_REVERSE_KL,
    names.DISTILL_TVD,
    names.DISTILL_TOP1_AGREEMENT,
    names.DISTILL_TOP5_AGREEMENT,
    names.DISTILL_ENTROPY_STUDENT,
    names.DISTILL_ENTROPY_TEACHER,
)

Sums = dict[str, Tensor]
ClassesOf = Callable[[TeacherChunk, Tensor, Tensor], Classes]  # `TeacherSignal.classes`


def distillation_sums(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: TeacherSignal,
    *,
    vocab_size: int | None = None,
    uniforms: Tensor | None = None,
    chunk_rows: int | None = None,
    compiled: bool = False,
    documents: Tensor | None = None,
) -> Sums:
    """Return sums over target positions by metric name; they do not depend on `chunk_rows`.

    Under autocast the matrix products run in its dtype; all else is computed in fp32.

    Args:
        hidden: (N, D) student hidden states after the final layer norm.
        weight: (V, D) student head. Both heads are truncated to the smaller one, or to `vocab_size` if smaller still,
            so that padding is in no softmax.
        labels: (N,) int64 below this vocabulary size, or IGNORE_INDEX.
        teacher: dense, at all N positions; or top-k with K ≥ 5, at temperature 1 and at the targets only, in their
            order. The loss of a top-k teacher is left out.
        uniforms: (N, 2) numbers in [0, 1) to sample and accept drafts (acceptance.py); ignored with a top-k teacher.
        chunk_rows: C; by default a chunk has 2^25 logits (2^22 uncompiled), in chunks of equal size.
        compiled: run the work on a chunk's logits through torch.compile: seconds once, then half the time.
        documents: (targets,) document group of each target; adds the sums DOCUMENT_NATS and DOCUMENT_TARGETS.

    Raises:
        ValueError: hidden states, labels and teacher differ in their number of positions, or the teacher has no
            distribution over the student's tokens.
    """
    kept = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    _check_rows(hidden, labels, teacher, len(kept))
    hidden, labels = hidden[kept], labels[kept]
    uniforms = uniforms[kept] if uniforms is not None else None
    vocab_size = teacher.shared_vocabulary(min(weight.shape[0], vocab_size or weight.shape[0]))
    dtype, work, total, losses = compute_dtype(hidden), _chunk_function(teacher.classes, compiled), Sums(), []
    read_teacher = teacher.at_targets(kept).reader(vocab_size, partial(plain_head, dtype=dtype))
    most = LOGITS_OF_A_CHUNK if compiled else LOGITS_OF_AN_UNCOMPILED_CHUNK
    step = chunk_rows or even_chunk_rows(len(kept), vocab_size, most)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for rows, logits in logit_chunks(hidden, weight[:vocab_size], rows=step, dtype=dtype):
            chunk_uniforms = uniforms[rows] if uniforms is not None else None
            sums = work(logits, read_teacher(rows), labels[rows], chunk_uniforms)
            del logits
            losses.append(sums.pop(STUDENT_LOSSES))
            total = add_sums(total, sums)
    return total if documents is None else {**total, **document_sums(torch.cat(losses), documents)}


def chunk_sums(log_q: Tensor, labels: Tensor, best_q: Tensor, teacher: Classes) -> Sums:
    """Return the sums over one chunk, whose positions all have a target.

    Args:
        log_q: (C, V) student's log-probabilities.
        labels: (C,) int64.
        best_q: (C, 5) student's top-5 tokens, best first.
        teacher: teacher's distribution; if its classes are not tokens, its loss is unknown and left out.
    """
    log_p, student = finite(teacher.log_p), finite(log_q)  # 0 · log 0 is 0
    of_teacher = dict(zip(OF_TEACHER, model_sums(log_p, teacher.labels, teacher.top1), strict=True))
    if teacher.log_q is not None:
        del of_teacher[names.DISTILL_TEACHER_LOSS]
    return {
        **dict(zip(OF_STUDENT, model_sums(student, labels, best_q[:, 0]), strict=True)),
        **of_teacher,
        **divergence_sums(student if teacher.log_q is None else finite(teacher.log_q), log_p),
        **agreement_sums(best_q, teacher.top5, log_q.dtype),
    }


def model_sums(log_probabilities: Tensor, labels: Tensor, best: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, entropy and calibration (15,) of one model.

    Args:
        log_probabilities: (C, V), finite.
        labels, best: (C,) target and top-1 token.
    """
    confidence = log_probabilities.gather(1, best.unsqueeze(1)).exp()  # (C, 1)
    surplus = (best == labels).unsqueeze(1).to(confidence.dtype) - confidence
    bins = (confidence * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)  # [low, high)
    calibration = torch.where(bins == torch.arange(CALIBRATION_BINS, device=bins.device), surplus, 0.0).sum(0)
    loss = -log_probabilities.gather(1, labels.unsqueeze(1)).sum()
    return loss, -(log_probabilities.exp() * log_probabilities).sum(1).sum(), calibration


def divergence_sums(log_q: Tensor, log_p: Tensor) -> Sums:
    """Return forward KL, reverse KL and TVD from finite log-probabilities (C, E) of E tokens or classes."""
    q, p, difference = log_q.exp(), log_p.exp(), log_p - log_q
    return {
        names.DISTILL_KL: (p * difference).sum(1).sum(),
        names.DISTILL_REVERSE_KL: -(q * difference).sum(1).sum(),
        names.DISTILL_TVD: (p - q).abs().sum(1).sum() / 2,
    }


def agreement_sums(best_q: Tensor, best_p: Tensor, dtype: torch.dtype = torch.float32) -> Sums:
    """Return the agreement of top-5 tokens (C, 5) of student and teacher, best first; shares in `dtype`."""
    shared = (best_p.unsqueeze(2) == best_q.unsqueeze(1)).any(2)  # (C, 5)
    return {
        names.DISTILL_TOP1_AGREEMENT: (best_p[:, 0] == best_q[:, 0]).sum(),
        names.DISTILL_TOP5_AGREEMENT: shared.to(dtype).mean(1).sum(),
    }


def add_sums(first: Sums, second: Sums) -> Sums:
    """Add the sums of two sets of positions; an empty dictionary is zero."""
    return {name: first[name] + value for name, value in second.items()} if first else second


def figures(sums: Sums, targets: float) -> dict[str, float]:
    """Convert sums over `targets` positions to figures by metric name; the student's cross-entropy is val/loss.

    ECE is the sum over bins of (share of the positions) · |accuracy − mean confidence|, as in Guo et al. 2017
    (arXiv 1706.04599).

    Raises:
        ValueError: no position.
    """
    if not targets:
        raise ValueError("The data have no target position at which to compare student and teacher.")
    means = {name: value.item() / targets for name, value in sums.items() if name in MEANS}
    means[names.DISTILL_ACCEPTANCE] = 1 - means[names.DISTILL_TVD]
    means[names.DISTILL_ECE] = sums[STUDENT_CALIBRATION].abs().sum().item() / targets
    means[names.DISTILL_TEACHER_ECE] = sums[TEACHER_CALIBRATION].abs().sum().item() / targets
    return means


def gap_closed(baseline_loss: float, student_loss: float, teacher_loss: float) -> float | None:
    """Return (baseline − student) / (baseline − teacher): 0 at the baseline's loss, 1 at the teacher's.

    None if the baseline is no worse than the teacher.
    """
    gap = baseline_loss - teacher_loss
    return (baseline_loss - student_loss) / gap if gap > 0 else None


def _check_rows(hidden: Tensor, labels: Tensor, teacher: TeacherSignal, targets: int) -> None:
    if len(hidden) != len(labels) or teacher.rows != (targets if teacher.only_targets else len(labels)):
        raise ValueError(
            f"hidden has {len(hidden)} rows, labels {len(labels)}, the teacher {teacher.rows}; "
            f"they must be equal, but a stored teacher has one row per target, here {targets}."
        )


def _chunk(classes_of: ClassesOf, logits: Tensor, read: TeacherChunk, labels: Tensor, uniforms: Tensor | None) -> Sums:
    log_q = log_softmax(logits)  # (C, V)
    teacher = classes_of(read, log_q, labels)
    # Top-k of the logits, so that a compiled chunk never writes its log-probabilities to memory.
    sums = chunk_sums(log_q, labels, top_tokens(logits), teacher)
    sums[STUDENT_LOSSES] = _losses(log_q, labels)
    if uniforms is None or teacher.log_q is not None:
        return sums
    return {**sums, **acceptance_sums(log_q, teacher.log_p, uniforms)}


def _losses(log_q: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy (C,) at each target, finite as in the sums."""
    return -finite(log_q.gather(1, labels.unsqueeze(1)).squeeze(1))


@cache
def _chunk_function(
    classes_of: ClassesOf, compiled: bool
) -> Callable[[Tensor, TeacherChunk, Tensor, Tensor | None], Sums]:
    work = partial(_chunk, classes_of)
    # dynamic: the number of targets varies, and each new one would be compiled again
    return torch.compile(work, dynamic=True) if compiled else work
