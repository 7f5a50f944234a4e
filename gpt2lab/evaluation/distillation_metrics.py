"""Distillation metrics: how far a student's predictions are from its teacher's, as sums over target positions.

Shapes: N positions, C positions of one chunk, D and Dt hidden widths, V vocabulary, K stored entries of a position.

With q the student's and p the teacher's probabilities at temperature 1, each position gives:
    losses              −log q_y and −log p_y at the label y
    KL, reverse KL      Σ p (log p − log q) and Σ q (log q − log p)
    TVD                 ½ Σ |p − q|; 1 − TVD is how often speculative decoding accepts a student's draft
    top-1, top-5        whether both hold the same entry likeliest; the share of the teacher's five likeliest that are
                        among the student's five
    entropies           −Σ q log q and −Σ p log p
    calibration         by confidence in the likeliest entry, in 15 bins: how far being right lies above confidence

A teacher that is known by its K likeliest entries and the probability of all others together is compared over K + 1
classes, the others merged into one. Of a coarser partition KL both ways, TVD and the teacher's entropy are no larger
than of the whole vocabulary, so the acceptance 1 − TVD is no smaller. All else is what the whole teacher gives, but for
its loss, which such entries do not tell.

Sums add over chunks, batches and ranks; `figures` divides them once by the number of targets. Logits (C, V) live only
while their chunk is worked on, so no (N, V) tensor exists for student or teacher.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gpt2lab import metric_names as names
from gpt2lab.data.batch import IGNORE_INDEX
from gpt2lab.data.document_groups import document_sums
from gpt2lab.evaluation.acceptance import drawn_sums
from gpt2lab.losses.divergences import finite
from gpt2lab.losses.teacher_signal import DenseTeacher, TopKTeacher

LOGITS_OF_A_CHUNK = 2**25  # of one model; they take 64 MiB in bf16
LOGITS_OF_AN_UNCOMPILED_CHUNK = 2**23  # several more such matrices live at a time, in fp32
LIKELIEST = 5
CALIBRATION_BINS = 15

STUDENT_CALIBRATION, TEACHER_CALIBRATION = "calibration_student", "calibration_teacher"  # names of (15,) sums
STUDENT_LOSSES = "losses_student"  # name of the student's cross-entropy at each target, (C,) of a chunk
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
Likeliest = tuple[Tensor, Tensor]


def distillation_sums(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: DenseTeacher | TopKTeacher,
    *,
    vocab_size: int | None = None,
    uniforms: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    chunk_rows: int | None = None,
    compiled: bool = False,
    documents: Tensor | None = None,
) -> Sums:
    """Sums over the positions that have a target, by metric name; the result does not depend on `chunk_rows`.

    Under autocast the matrix products run in its dtype; all else is computed in fp32.

    Args:
        hidden: (N, D) student hidden states after the final layer norm.
        weight: (V, D) student head. Heads of different length are cut to the shorter, or to `vocab_size` where that is
            less still: an entry that one of them lacks is padding, and has no probability in either.
        labels: (N,) int64 below the number of entries that count, or `ignore_index`.
        teacher: dense, at all N positions; or top-k at the targets alone, in their order, at temperature 1, with five
            entries or more of which the likeliest come first. Without the whole teacher its loss is left out.
        uniforms: (N, 2) numbers in [0, 1) that decide which drafts are drawn and accepted (acceptance.py); for
            dense teachers.
        chunk_rows: C; by default as many as hold 2^25 logits (2^23 uncompiled), in chunks of one size.
        compiled: run the work on a chunk's logits through torch.compile, which takes seconds once and then halves its
            time.
        documents: (targets,) document group of each; given, the sums hold DOCUMENT_NATS and DOCUMENT_TARGETS too.

    Raises:
        ValueError: hidden states, labels and teacher differ in their number of positions.
    """
    kept = (labels != ignore_index).nonzero().squeeze(1)
    _check_rows(hidden, labels, teacher, len(kept))
    hidden, labels = hidden[kept], labels[kept]
    uniforms = uniforms[kept] if uniforms is not None else None
    entries = min(weight.shape[0], vocab_size or weight.shape[0])
    if isinstance(teacher, DenseTeacher):
        entries = min(entries, teacher.weight.shape[0])
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    kind: Any = type(teacher)
    work, total, losses = _chunk_function(kind, compiled), Sums(), []
    with torch.no_grad(), torch.autocast(device, enabled=False):
        head, said_of = weight[:entries].to(dtype), _teacher_rows(teacher, kept, entries, dtype)  # (V, D)
        rows_of_a_chunk = chunk_rows or _even_chunks(len(kept), entries, compiled)
        for start in range(0, max(len(kept), 1), rows_of_a_chunk):  # without any row one empty chunk gives the zeros
            rows = slice(start, start + rows_of_a_chunk)
            draws = uniforms[rows] if uniforms is not None else None
            sums = work(hidden[rows].to(dtype) @ head.T, said_of(rows), labels[rows], draws)
            losses.append(sums.pop(STUDENT_LOSSES))
            total = added(total, sums)
    return total if documents is None else {**total, **document_sums(torch.cat(losses), documents)}


def chunk_sums(log_q: Tensor, log_p: Tensor, labels: Tensor, likeliest: Likeliest | None = None) -> Sums:
    """The sums over one chunk's positions, all of which have a target.

    Args:
        log_q, log_p: (C, V) log-probabilities of student and teacher.
        labels: (C,) int64.
        likeliest: (C, 5) entries that student and teacher hold likeliest, best first; found here where not given.
    """
    best_q, best_p = likeliest if likeliest is not None else (_likeliest(log_q), _likeliest(log_p))
    log_q, log_p = finite(log_q), finite(log_p)  # 0 · log 0 is 0
    return {
        **dict(zip(OF_STUDENT, own_sums(log_q, labels, best_q[:, 0]), strict=True)),
        **dict(zip(OF_TEACHER, own_sums(log_p, labels, best_p[:, 0]), strict=True)),
        **divergence_sums(log_q, log_p),
        **agreement_sums(best_q, best_p, log_q.dtype),
    }


def bucket_sums(log_q: Tensor, ids: Tensor, logs: Tensor, labels: Tensor, best_q: Tensor) -> Sums:
    """Sums of `chunk_sums`, from K entries of the teacher and one class for all others; without the teacher's loss.

    Args:
        log_q: (C, V) log-probabilities of the student.
        ids, logs: (C, K) entries and (C, K + 1) log-probabilities of a TopKTeacher.
        labels: (C,) int64.
        best_q: (C, 5) entries that the student holds likeliest, best first.
    """
    others = log_q.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)  # (C, 1)
    log_q_of_classes = finite(torch.cat([log_q.gather(1, ids), others], dim=1))  # (C, K + 1)
    log_p = finite(logs.to(log_q.dtype).log_softmax(1))  # float16 records miss a sum of 1 by rounding
    is_label = torch.cat([ids == labels.unsqueeze(1), torch.ones_like(others, dtype=torch.bool)], dim=1)
    class_of_label = is_label.to(torch.uint8).argmax(1)  # (C,) the first that holds it
    _, teacher_entropy, teacher_calibration = own_sums(log_p, class_of_label, torch.zeros_like(class_of_label))
    return {
        **dict(zip(OF_STUDENT, own_sums(finite(log_q), labels, best_q[:, 0]), strict=True)),
        names.DISTILL_ENTROPY_TEACHER: teacher_entropy,
        TEACHER_CALIBRATION: teacher_calibration,
        **divergence_sums(log_q_of_classes, log_p),
        **agreement_sums(best_q, ids[:, :LIKELIEST], log_q.dtype),
    }


def own_sums(log_probabilities: Tensor, labels: Tensor, best: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, entropy and calibration (15,) of one model.

    Args:
        log_probabilities: (C, V), finite.
        labels, best: (C,) the target and the likeliest entry.
    """
    confidence = log_probabilities.gather(1, best.unsqueeze(1)).exp()  # (C, 1)
    surplus = (best == labels).unsqueeze(1).to(confidence.dtype) - confidence
    bins = (confidence * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)  # [low, high)
    calibration = torch.where(bins == torch.arange(CALIBRATION_BINS, device=bins.device), surplus, 0.0).sum(0)
    loss = -log_probabilities.gather(1, labels.unsqueeze(1)).sum()
    return loss, -(log_probabilities.exp() * log_probabilities).sum(1).sum(), calibration


def divergence_sums(log_q: Tensor, log_p: Tensor) -> Sums:
    """KL both ways and TVD from finite log-probabilities (C, E): of E entries, or of buckets of them."""
    q, p, difference = log_q.exp(), log_p.exp(), log_p - log_q
    return {
        names.DISTILL_KL: (p * difference).sum(1).sum(),
        names.DISTILL_REVERSE_KL: -(q * difference).sum(1).sum(),
        names.DISTILL_TVD: (p - q).abs().sum(1).sum() / 2,
    }


def agreement_sums(best_q: Tensor, best_p: Tensor, dtype: torch.dtype = torch.float32) -> Sums:
    """Of the likeliest entries (C, 5) of student and teacher, best first; shares in `dtype`."""
    shared = (best_p.unsqueeze(2) == best_q.unsqueeze(1)).any(2)  # (C, 5)
    return {
        names.DISTILL_TOP1_AGREEMENT: (best_p[:, 0] == best_q[:, 0]).sum(),
        names.DISTILL_TOP5_AGREEMENT: shared.to(dtype).mean(1).sum(),
    }


def added(first: Sums, second: Sums) -> Sums:
    """The sums of two sets of positions; an empty dictionary stands for none."""
    return {name: first[name] + value for name, value in second.items()} if first else second


def figures(sums: Sums, targets: float) -> dict[str, float]:
    """Sums over `targets` positions → figures under their metric names, the student's cross-entropy as val/loss.

    The calibration error is Σ over bins of (share of the positions) · |share of them that was right − mean confidence|,
    as in Guo et al. 2017 (arXiv 1706.04599).

    Raises:
        ValueError: no position.
    """
    if not targets:
        raise ValueError("There is no target position to compare student and teacher at.")
    means = {name: value.item() / targets for name, value in sums.items() if name in MEANS}
    means[names.DISTILL_ACCEPTANCE] = 1 - means[names.DISTILL_TVD]
    means[names.DISTILL_ECE] = sums[STUDENT_CALIBRATION].abs().sum().item() / targets
    means[names.DISTILL_TEACHER_ECE] = sums[TEACHER_CALIBRATION].abs().sum().item() / targets
    return means


def gap_closed(baseline_loss: float, student_loss: float, teacher_loss: float) -> float | None:
    """(baseline − student) / (baseline − teacher): 0 as good as training without a teacher, 1 as good as the teacher.

    None where the baseline is no worse than the teacher, so that there is no gap.
    """
    gap = baseline_loss - teacher_loss
    return (baseline_loss - student_loss) / gap if gap > 0 else None


def _check_rows(hidden: Tensor, labels: Tensor, teacher: DenseTeacher | TopKTeacher, targets: int) -> None:
    theirs, wanted = (
        (len(teacher.hidden), len(labels)) if isinstance(teacher, DenseTeacher) else (len(teacher.ids), targets)
    )
    if len(hidden) != len(labels) or theirs != wanted:
        raise ValueError(
            f"hidden has {len(hidden)} rows, labels {len(labels)}, the teacher {theirs}; "
            f"they must be equal, but for a top-k teacher's, which are those of the {targets} targets."
        )


def _teacher_rows(
    teacher: DenseTeacher | TopKTeacher, kept: Tensor, entries: int, dtype: torch.dtype
) -> Callable[[slice], tuple[Tensor, ...]]:
    """What a chunk is told of its teacher: a function of the chunk's rows, which count the targets alone."""
    if isinstance(teacher, DenseTeacher):
        hidden, head = teacher.hidden[kept], teacher.weight[:entries].to(dtype)  # (targets, Dt), (V, Dt)
        return lambda rows: (hidden[rows].to(dtype) @ head.T,)
    logs = teacher.class_logs
    return lambda rows: (teacher.ids[rows], logs[rows])


def _dense_chunk(logits: Tensor, said: tuple[Tensor, ...], labels: Tensor, uniforms: Tensor | None) -> Sums:
    (teacher_logits,) = said  # (C, V)
    log_q, log_p = _log_softmax(logits), _log_softmax(teacher_logits)  # (C, V)
    # From the logits: a compiled chunk then never writes its log-probabilities to memory.
    sums = chunk_sums(log_q, log_p, labels, (_likeliest(logits), _likeliest(teacher_logits)))
    sums[STUDENT_LOSSES] = _losses(log_q, labels)
    return sums if uniforms is None else {**sums, **drawn_sums(log_q, log_p, uniforms)}


def _top_k_chunk(logits: Tensor, said: tuple[Tensor, ...], labels: Tensor, uniforms: Tensor | None) -> Sums:
    ids, logs = said
    log_q = _log_softmax(logits)
    sums = bucket_sums(log_q, ids, logs, labels, _likeliest(logits))
    return {**sums, STUDENT_LOSSES: _losses(log_q, labels)}


def _losses(log_q: Tensor, labels: Tensor) -> Tensor:
    """(C,) cross-entropy at each target, finite as in the sums."""
    return -finite(log_q.gather(1, labels.unsqueeze(1)).squeeze(1))


CHUNKS = {DenseTeacher: _dense_chunk, TopKTeacher: _top_k_chunk}


@cache
def _chunk_function(
    teacher: type, compiled: bool
) -> Callable[[Tensor, tuple[Tensor, ...], Tensor, Tensor | None], Sums]:
    # dynamic: the number of targets differs from batch to batch, and each new one would be compiled anew
    return torch.compile(CHUNKS[teacher], dynamic=True) if compiled else CHUNKS[teacher]


def _likeliest(scores: Tensor) -> Tensor:
    """(C, V) → (C, 5) entries, best first."""
    return scores.topk(min(LIKELIEST, scores.shape[1]), dim=1).indices


def _log_softmax(logits: Tensor) -> Tensor:
    """(C, V) → (C, V), at least in fp32."""
    return torch.log_softmax(logits.to(torch.promote_types(torch.float32, logits.dtype)), dim=1)


def _even_chunks(rows: int, entries: int, compiled: bool) -> int:
    chunks = -(-rows * entries // (LOGITS_OF_A_CHUNK if compiled else LOGITS_OF_AN_UNCOMPILED_CHUNK))
    return -(-rows // max(chunks, 1)) or 1
