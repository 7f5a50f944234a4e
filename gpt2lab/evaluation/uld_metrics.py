"""ULD metrics: how well a student does whose teacher has another tokenizer, as sums over target positions.

Shapes: N positions, C positions of one chunk, D hidden width, V vocabulary.

Tokens of two vocabularies cannot be compared one by one, so there is no KL and no agreement. What remains is the
student's own figures, the distance it is trained on, and the teacher's loss over the same bytes of text.
"""

import torch
from torch import Tensor

from gpt2lab import metric_names as names
from gpt2lab.data.batch import IGNORE_INDEX
from gpt2lab.data.document_groups import document_sums
from gpt2lab.evaluation.distillation_metrics import OF_STUDENT, STUDENT_CALIBRATION, Sums, added, own_sums
from gpt2lab.losses.lm_head_loss import lm_head_loss
from gpt2lab.losses.logit_chunks import logit_chunks
from gpt2lab.losses.teacher_signal import TeacherSignal, log_softmax
from gpt2lab.settings import LossSettings

TEACHER_NATS, TEACHER_BYTES, TARGET_BYTES = "teacher_nats", "teacher_bytes", "target_bytes"  # names of sums
PLAIN = LossSettings("uld", hard_weight=0.0, scale_t2=False)


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
    """Return sums over the positions that have a target, by metric name; the distance is at temperature 1.

    Args:
        hidden: (N, D) student hidden states after the final layer norm.
        weight: (V, D) student head; tokens from `vocab_size` on are padding and are left out.
        labels: (N,) int64, or IGNORE_INDEX.
        teacher: aligned, at all N positions.
        compiled: run the work on a chunk's logits for the distance through torch.compile.
        documents: (targets,) document group of each; given, the sums hold DOCUMENT_NATS and DOCUMENT_TARGETS too.
    """
    kept = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    hidden, weight, labels, teacher = hidden[kept], weight[:vocab_size], labels[kept], teacher.at_targets(kept)
    result = lm_head_loss(hidden, weight, labels, teacher=teacher, loss=PLAIN, compiled=compiled)
    loss = teacher.loss(labels, len(weight))
    return {
        **_own_sums(hidden, weight, labels, documents),
        names.DISTILL_ULD: result.divergence,
        names.DISTILL_MATCHED: teacher.matched.sum(),
        TEACHER_NATS: loss.nats,
        TEACHER_BYTES: torch.tensor(loss.scored),
        TARGET_BYTES: torch.tensor(loss.total),
    }


@torch.no_grad()
def _own_sums(hidden: Tensor, weight: Tensor, labels: Tensor, documents: Tensor | None) -> Sums:
    """Loss, entropy and calibration of the student at targets only."""
    total, losses = Sums(), []
    for rows, logits in logit_chunks(hidden, weight):
        scores = log_softmax(logits)  # (C, V)
        of_chunk = own_sums(scores, labels[rows], scores.argmax(1))
        total = added(total, dict(zip(OF_STUDENT, of_chunk, strict=True)))
        losses.append(-scores.gather(1, labels[rows].unsqueeze(1)).squeeze(1))
    return total if documents is None else {**total, **document_sums(torch.cat(losses), documents)}


def uld_figures(sums: Sums, targets: float) -> dict[str, float]:
    """Sums over `targets` positions → figures under their metric names.

    The teacher's loss is its nats per byte times the bytes of a student's token: what a student that predicts the text
    as well has as val/loss.
    """
    own = (names.VAL_LOSS, names.DISTILL_ENTROPY_STUDENT, names.DISTILL_ULD, names.DISTILL_MATCHED)
    found = {name: sums[name].item() / targets for name in own}
    found[names.DISTILL_ECE] = sums[STUDENT_CALIBRATION].abs().sum().item() / targets
    per_byte = sums[TEACHER_NATS].item() / max(sums[TEACHER_BYTES].item(), 1)
    found[names.DISTILL_TEACHER_LOSS] = per_byte * sums[TARGET_BYTES].item() / targets
    return found
