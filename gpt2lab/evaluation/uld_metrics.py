"""ULD metrics: what can be said of a student whose teacher has another tokenizer, as sums over target positions.

Shapes: N positions, C positions of one chunk, D hidden width, V vocabulary.

Entries of two vocabularies cannot be compared one by one, so there is no KL and no agreement. What remains is the
student's own figures, the distance it is trained on, and the teacher's loss over the same bytes of text.
"""

import torch
from torch import Tensor

from gpt2lab import metric_names as names
from gpt2lab.data.batch import IGNORE_INDEX
from gpt2lab.data.document_groups import document_sums
from gpt2lab.evaluation.distillation_metrics import OF_STUDENT, STUDENT_CALIBRATION, Sums, added, own_sums
from gpt2lab.losses.lm_head_loss import lm_head_loss
from gpt2lab.losses.teacher_signal import AlignedTeacher
from gpt2lab.settings import LossSettings

LOGITS_OF_A_CHUNK = 2**23
TEACHER_NATS, TEACHER_BYTES, TARGET_BYTES = "teacher_nats", "teacher_bytes", "target_bytes"  # names of sums
PLAIN = LossSettings("uld", hard_weight=0.0, scale_t2=False)


def uld_sums(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: AlignedTeacher,
    *,
    compiled: bool = False,
    documents: Tensor | None = None,
) -> Sums:
    """Sums over the positions that have a target, by metric name; the distance at temperature 1.

    Args:
        hidden: (N, D) student hidden states after the final layer norm.
        weight: (V, D) student head, without padding.
        labels: (N,) int64, or IGNORE_INDEX.
        compiled: run the work on a chunk's logits for the distance through torch.compile.
        documents: (targets,) document group of each; given, the sums hold DOCUMENT_NATS and DOCUMENT_TARGETS too.
    """
    kept = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    hidden, labels, places = hidden[kept], labels[kept], teacher.places[kept]
    aligned = AlignedTeacher(teacher.hidden, teacher.weight, places, teacher.text)
    result = lm_head_loss(hidden, weight, labels, teacher=aligned, loss=PLAIN, compiled=compiled)
    nats, spelled = nats_of_teacher(teacher)
    return {
        **_own_sums(hidden, weight, labels, documents),
        names.DISTILL_ULD: result.divergence,
        names.DISTILL_MATCHED: (places >= 0).sum(),
        TEACHER_NATS: nats,
        TEACHER_BYTES: torch.tensor(spelled),
        TARGET_BYTES: torch.tensor(teacher.text.target_bytes),
    }


def nats_of_teacher(teacher: AlignedTeacher) -> tuple[Tensor, int]:
    """Its cross-entropy () on its own tokens within the student's targets, and how many bytes these spell."""
    targets = (teacher.text.labels != IGNORE_INDEX).nonzero().squeeze(1)
    labels = teacher.text.labels[targets]
    return lm_head_loss(teacher.hidden[targets], teacher.weight, labels).cross_entropy, teacher.text.label_bytes


def _own_sums(hidden: Tensor, weight: Tensor, labels: Tensor, documents: Tensor | None) -> Sums:
    """Loss, entropy and calibration of the student at targets only."""
    device, total, losses = hidden.device.type, Sums(), []
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.no_grad(), torch.autocast(device, enabled=False):
        head, step = weight.to(dtype).T, max(LOGITS_OF_A_CHUNK // weight.shape[0], 1)
        for start in range(0, max(len(labels), 1), step):  # without any row one empty chunk gives the zeros
            logits = hidden[start : start + step].to(dtype) @ head  # (C, V)
            scores = torch.log_softmax(logits.to(torch.promote_types(torch.float32, dtype)), dim=1)
            of_chunk = labels[start : start + step]
            total = added(total, dict(zip(OF_STUDENT, own_sums(scores, of_chunk, scores.argmax(1)), strict=True)))
            losses.append(-scores.gather(1, of_chunk.unsqueeze(1)).squeeze(1))
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
