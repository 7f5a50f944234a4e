"""ULD metrics: distillation metrics for a teacher with a different tokenizer, as sums over target positions.

Shapes: N positions, C positions of one chunk, D hidden width, V vocabulary size.

Probabilities of tokens from two vocabularies cannot be compared, so there is no KL and no agreement. The metrics are
the student's own figures, the ULD that it is trained with, and the teacher's loss over the same bytes of text.
"""

import torch
from torch import Tensor

from gpt2lab import metric_names as names
from gpt2lab.data.batch import IGNORE_INDEX
from gpt2lab.data.document_groups import document_sums
from gpt2lab.evaluation.distillation_metrics import OF_STUDENT, STUDENT_CALIBRATION, Sums, add_sums, model_sums
from gpt2lab.losses.lm_head_loss import lm_head_loss
from gpt2lab.losses.logit_chunks import logit_chunks
from gpt2lab.losses.teacher_signal import TeacherSignal, log_softmax
from gpt2lab.settings import LossSettings

TEACHER_NATS, TEACHER_BYTES, TARGET_BYTES = "teacher_nats", "teacher_bytes", "target_bytes"  # names of sums
ULD_ALONE = LossSettings("uld", hard_weight=0.0, scale_t2=False)


def uld_sums(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: TeacherSignal,
    *,
    vocab_size: int | None = None,
    compiled: bool = False,
    documents: Tensor | None = None,
) -> Sums:
    """Return sums over target positions by metric name; the ULD is at temperature 1.

    Args:
        hidden: (N, D) student hidden states after the final layer norm.
        weight: (V, D) student head; rows from `vocab_size` on are padding and are left out.
        labels: (N,) int64, or IGNORE_INDEX.
        teacher: an aligned teacher, at all N positions.
        compiled: run the work on a chunk's logits for the ULD through torch.compile.
        documents: (targets,) document group of each target; adds the sums DOCUMENT_NATS and DOCUMENT_TARGETS.
    """
    kept = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    hidden, weight, labels, teacher = hidden[kept], weight[:vocab_size], labels[kept], teacher.at_targets(kept)
    result = lm_head_loss(hidden, weight, labels, teacher=teacher, loss=ULD_ALONE, compiled=compiled)
    loss = teacher.loss(labels, len(weight))
    return {
        **_student_sums(hidden, weight, labels, documents),
        names.DISTILL_ULD: result.divergence,
        names.DISTILL_MATCHED: teacher.matched.sum(),
        TEACHER_NATS: loss.nats,
        TEACHER_BYTES: torch.tensor(loss.scored),
        TARGET_BYTES: torch.tensor(loss.total),
    }


@torch.no_grad()
def _student_sums(hidden: Tensor, weight: Tensor, labels: Tensor, documents: Tensor | None) -> Sums:
    """Sum loss, entropy and calibration of the student over targets."""
    total, losses = Sums(), []
    for rows, logits in logit_chunks(hidden, weight):
        scores = log_softmax(logits)  # (C, V)
        chunk = model_sums(scores, labels[rows], scores.argmax(1))
        total = add_sums(total, dict(zip(OF_STUDENT, chunk, strict=True)))
        losses.append(-scores.gather(1, labels[rows].unsqueeze(1)).squeeze(1))
    return total if documents is None else {**total, **document_sums(torch.cat(losses), documents)}


def uld_figures(sums: Sums, targets: float) -> dict[str, float]:
    """Convert sums over `targets` positions to figures by metric name.

    The teacher's loss is its nats per byte times the mean bytes of a student's target, which is comparable with the
    student's val/loss.
    """
    own = (names.VAL_LOSS, names.DISTILL_ENTROPY_STUDENT, names.DISTILL_ULD, names.DISTILL_MATCHED)
    found = {name: sums[name].item() / targets for name in own}
    found[names.DISTILL_ECE] = sums[STUDENT_CALIBRATION].abs().sum().item() / targets
    per_byte = sums[TEACHER_NATS].item() / max(sums[TEACHER_BYTES].item(), 1)
    found[names.DISTILL_TEACHER_LOSS] = per_byte * sums[TARGET_BYTES].item() / targets
    return found
