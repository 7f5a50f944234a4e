"""Preflight: is this distillation real? Looks at teacher, student and loss before the first step, for a few seconds.

Each look gives a sentence on what is wrong, or nothing. Under FSDP every rank must call them: the student is run.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.data.tokenizer import differing_tokens, load_tokenizer
from gpt2lab.errors import InputError
from gpt2lab.evaluation.uld_metrics import nats_of_teacher
from gpt2lab.losses.divergences import finite
from gpt2lab.losses.lm_head_loss import lm_head_loss
from gpt2lab.losses.teacher_signal import AlignedTeacher, DenseTeacher, TeacherSignal, TopKTeacher
from gpt2lab.system.device import exact_dtype

log = logging.getLogger(__name__)

TOKENS = 2048  # that teacher and student are compared on
PROBED = 32  # positions on which gradients are looked at
SLOPE_TOLERANCE = 0.1  # of a difference quotient in fp32
SMALL_GAP = 0.1  # nats per token by which a teacher should at least be better


def problems(distill: Any) -> Iterator[str]:
    """What makes this teacher unfit for this student, one sentence each."""
    yield _tokens(distill)
    batch = _probe(distill)
    with distill.trainer.precision_plugin.forward_context(), torch.no_grad():
        signal = distill.signal(batch, "val")
        again = distill.signal(batch, "val")
    yield _answers_twice(signal, again)
    yield _losses(distill, batch, signal)
    yield _gradient(distill, batch, signal)


def _probe(distill: Any) -> Batch:
    """The first validation sequences, as many as hold TOKENS positions."""
    batch = next(iter(distill.trainer.datamodule.val_dataloader()))
    rows = max(TOKENS // batch.input_ids.shape[1], 1)
    few = replace(
        batch,
        input_ids=batch.input_ids[:rows],
        labels=batch.labels[:rows],
        target_tokens=0,
        indices=batch.indices[:rows],
        prompt_lengths=None if batch.prompt_lengths is None else batch.prompt_lengths[:rows],
        references=None,
        spans=None if batch.spans is None else batch.spans[:rows],
    )
    return distill.transfer_batch_to_device(few, distill.device, 0)


def _tokens(distill: Any) -> str:
    """The two number the same text alike; under loss=uld they need not."""
    try:
        theirs = load_tokenizer(distill.teacher_source)
    except InputError:
        return f"The teacher {distill.teacher_source} holds no tokenizer, so its token ids may mean other text."
    different = differing_tokens(theirs, distill.tokenizer)
    if distill.alignment is not None:
        if not different:
            log.warning(
                "preflight: teacher and student have one tokenizer, so loss=forward_kl teaches more than loss=uld"
            )
        return ""
    return f"Teacher and student number tokens differently, for example {different}." if different else ""


def _answers_twice(signal: TeacherSignal, again: TeacherSignal) -> str:
    """The teacher says the same of the same text: no dropout is at work."""
    dense = DenseTeacher | AlignedTeacher
    first, second = (said.hidden if isinstance(said, dense) else said.ids for said in (signal, again))
    return (
        "" if torch.equal(first, second) else "The teacher answers the same text differently each time: dropout is on."
    )


@torch.no_grad()
def _losses(distill: Any, batch: Batch, signal: TeacherSignal) -> str:
    """The teacher predicts these data better than the student, counted over the same targets."""
    with distill.trainer.precision_plugin.forward_context():
        student = distill.head_loss(batch)
        teacher_nats, teacher_targets = _teacher_loss(distill, batch, signal)
    if teacher_targets != int(student.tokens):
        return f"The teacher speaks of {teacher_targets} targets where the student counts {int(student.tokens)}."
    sums = torch.stack([teacher_nats, student.cross_entropy.float(), student.tokens.float()])
    teacher_nats, student_nats, targets = distill.over_ranks(sums).tolist()
    if isinstance(signal, AlignedTeacher):
        problem = _common_ground(distill, batch, signal, targets, teacher_nats, student_nats)
        if problem:
            return problem
    teacher_loss, student_loss = teacher_nats / targets, student_nats / targets
    distill.teacher_loss = teacher_loss
    gap = student_loss - teacher_loss
    log.info("preflight: teacher %.3f nats per token, student %.3f before training", teacher_loss, student_loss)
    if gap <= 0:
        return f"The teacher's loss {teacher_loss:.3f} is not below the student's {student_loss:.3f} on these data."
    if gap < SMALL_GAP:
        log.warning("preflight: the teacher is better by only %.3f nats per token; expect little from it", gap)
    return ""


def _common_ground(
    distill: Any, batch: Batch, signal: AlignedTeacher, targets: float, teacher_nats: float, student_nats: float
) -> str:
    """Tokens of two tokenizers: some begin at the same byte, and bytes are what both losses can be counted in."""
    matched = (signal.places >= 0) & (batch.labels.flatten() != IGNORE_INDEX)
    spelled = torch.tensor([signal.text.label_bytes, signal.text.target_bytes], device=matched.device)
    sums = torch.cat([matched.sum().unsqueeze(0), spelled]).to(exact_dtype(matched.device))
    found, of_teacher, of_targets = distill.over_ranks(sums).tolist()
    if not found or not of_teacher:
        return "No token of the teacher begins where a target of the student does, so it has nothing to say."
    log.info(
        "preflight: teacher %.3f nats per byte, student %.3f; %.0f %% of the targets begin a token of the teacher too",
        teacher_nats / of_targets,
        student_nats / of_targets,
        100 * found / targets,
    )
    return ""


def _teacher_loss(distill: Any, batch: Batch, signal: TeacherSignal) -> tuple[Tensor, int]:
    """(nats, number of targets): from its logits, or from what is stored of them, so that a wrong record shows.

    In tokens of its own: nats per byte times the bytes of the student's targets.
    """
    labels = batch.labels.flatten()
    kept = labels != IGNORE_INDEX
    if isinstance(signal, DenseTeacher):
        result = lm_head_loss(signal.hidden, signal.weight, labels, vocab_size=len(distill.tokenizer))
        return result.cross_entropy.float(), int(result.tokens)
    if isinstance(signal, AlignedTeacher):
        nats, spelled = nats_of_teacher(signal)
        return nats.float() * (signal.text.target_bytes / max(spelled, 1)), int(kept.sum())
    assert isinstance(signal, TopKTeacher)  # what the validation side of every cache holds
    targets = labels[kept]
    if len(signal.ids) != len(targets):
        return torch.zeros(()), len(signal.ids)
    hit = signal.ids == targets.unsqueeze(1)  # (targets, K)
    others, logs = max(len(distill.tokenizer) - signal.ids.shape[1], 1), finite(signal.class_logs)
    of_label = torch.where(hit.any(1), (logs[:, :-1] * hit).sum(1), logs[:, -1] - math.log(others))
    return -of_label.sum(), len(targets)


def _gradient(distill: Any, batch: Batch, signal: TeacherSignal) -> str:
    """The divergence pulls at the student, as its value says, and only at targets."""
    labels = batch.labels.flatten()
    looked_at = labels != IGNORE_INDEX
    if isinstance(signal, AlignedTeacher):
        looked_at &= signal.places >= 0
    targets = looked_at.nonzero().squeeze(1)[:PROBED]
    if isinstance(signal, AlignedTeacher):
        places = signal.places[targets]
        signal = AlignedTeacher(signal.hidden.float(), signal.weight.float(), places, signal.text)
    elif isinstance(signal, DenseTeacher):
        signal = DenseTeacher(signal.hidden[targets].float(), signal.weight.float())
    elif isinstance(signal, TopKTeacher):
        signal = signal.select(slice(len(targets)))
    masked = labels[targets].clone()
    masked[::2] = IGNORE_INDEX  # half of them count as padding

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return hidden.flatten(0, 1)[targets].float(), weight.float().clone()  # FSDP takes the weight away again

    with distill.trainer.precision_plugin.forward_context(), torch.no_grad():
        hidden, weight = distill.backbone(batch.input_ids, head, batch.spans)  # (PROBED, D), (V, D)
    if len(targets) < 2:  # of a small validation split this rank has no share, and another looks
        return ""
    soft, entries = replace(distill.loss_settings, hard_weight=0.0), len(distill.tokenizer)

    def value(at: Tensor) -> Tensor:
        given: dict[str, Any] = {"teacher": signal, "loss": soft, "mixing": distill.mixing_tensor()}
        return lm_head_loss(at, weight, masked, **given, vocab_size=entries).total

    with torch.autocast(distill.device.type, enabled=False), torch.enable_grad():
        at = hidden.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(at), at)
        if not gradient.norm() > 0:
            return "The divergence from the teacher has no gradient in the student: it would learn nothing from it."
        if gradient[::2].abs().max() > 0:
            return "Positions without a target, such as padding, pull at the student."
        if soft.name == "taid":  # its target moves with the student and is taken as constant
            return ""
        step = 0.01 * hidden.norm() * gradient / gradient.norm()
        slope = (value(hidden + step) - value(hidden - step)) / (2 * step.norm())
    if not abs(slope / gradient.norm() - 1) < SLOPE_TOLERANCE:
        return f"The divergence changes by {slope:.3g} where its gradient says {gradient.norm():.3g}."
    return ""
