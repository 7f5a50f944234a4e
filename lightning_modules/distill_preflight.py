"""Preflight: check a distillation's teacher, student and loss before the first step, in a few seconds.

Each check returns one sentence on what is wrong, or nothing. Under FSDP every rank must call them: the student is run.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.data.tokenizer import differing_tokens, load_tokenizer
from gpt2lab.errors import InputError
from gpt2lab.losses.lm_head_loss import lm_head_loss
from gpt2lab.losses.teacher_signal import TeacherLoss, TeacherSignal
from gpt2lab.settings import LossSettings
from gpt2lab.system.device import widest_float
from lightning_modules.language_model import DistillationTerm, LanguageModel

log = logging.getLogger(__name__)

TOKENS = 2048  # on which teacher and student are compared
PROBED = 32  # positions whose gradients are checked
SLOPE_TOLERANCE = 0.1  # of a difference quotient in fp32
SMALL_GAP = 0.1  # nats per token by which a teacher should at least be better


@dataclass
class Preflight:
    """The checks of one distillation.

    Attributes:
        student: the module that is trained.
        teacher_source: run directory, Hugging Face folder or Hub id.
        signal: from a validation batch to the teacher's distributions.
        loss: the distillation loss.
        mixing: TAID's share of the teacher.
        shares_tokenizer: whether the teacher reads the student's token ids (all losses but uld).
        teacher_loss: nats per target, once the losses have been compared.
    """

    student: LanguageModel
    teacher_source: str
    signal: Callable[[Batch], TeacherSignal]
    loss: LossSettings
    mixing: float
    shares_tokenizer: bool
    teacher_loss: float | None = None

    def problems(self) -> Iterator[str]:
        """Yield what makes this teacher unfit for this student, one sentence per check, or an empty string."""
        yield self._tokens()
        batch = self._probe()
        with self.student.trainer.precision_plugin.forward_context(), torch.no_grad():
            teacher, again = self.signal(batch), self.signal(batch)
        same = teacher.equals(again)
        yield "" if same else "The teacher predicts the same text differently each time: dropout is on."
        yield self._losses(batch, teacher)
        yield self.gradient(batch, teacher)

    def _probe(self) -> Batch:
        """Return the first validation sequences, as many as hold TOKENS positions."""
        batch = next(iter(self.student.trainer.datamodule.val_dataloader()))
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
        return self.student.transfer_batch_to_device(few, self.student.device, 0)

    def _tokens(self) -> str:
        """Both tokenizers number the same text alike; with loss=uld they need not."""
        try:
            theirs = load_tokenizer(self.teacher_source)
        except InputError:
            return f"The teacher {self.teacher_source} holds no tokenizer, so its token ids may mean other text."
        different = differing_tokens(theirs, self.student.tokenizer)
        if self.shares_tokenizer:
            return f"Teacher and student number tokens differently, for example {different}." if different else ""
        if not different:
            log.warning(
                "preflight: teacher and student have one tokenizer, so loss=forward_kl teaches more than loss=uld"
            )
        return ""

    @torch.no_grad()
    def _losses(self, batch: Batch, teacher: TeacherSignal) -> str:
        """The teacher predicts these data better than the student, counted over the same targets.

        A stored teacher's loss is computed from its records, so that wrong ones are noticed.
        """
        labels, vocab_size = batch.labels.flatten(), len(self.student.tokenizer)
        kept = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        is_wrong = torch.tensor(float(teacher.only_targets and teacher.rows != len(kept)), device=labels.device)
        if self.student.over_ranks(is_wrong).item():  # on any rank: the others would wait for it
            return (
                "The cached teacher's records do not match the targets of the student "
                f"(on this rank {teacher.rows} and {len(kept)})."
            )
        teacher = teacher.at_targets(kept)
        with self.student.trainer.precision_plugin.forward_context():
            student = self.student.lm_head_loss(batch)
            found = teacher.loss(labels[kept], vocab_size)
        sums = torch.stack([found.extrapolated, student.cross_entropy.float(), student.tokens.float()])
        teacher_nats, student_nats, targets = self.student.over_ranks(sums).tolist()
        if not self.shares_tokenizer:
            problem = self._common_ground(teacher, found, targets, teacher_nats, student_nats)
            if problem:
                return problem
        teacher_loss, student_loss = teacher_nats / targets, student_nats / targets
        self.teacher_loss = teacher_loss
        gap = student_loss - teacher_loss
        log.info("preflight: teacher %.3f nats per token, student %.3f before training", teacher_loss, student_loss)
        if gap <= 0:
            return f"The teacher's loss {teacher_loss:.3f} is not below the student's {student_loss:.3f} on these data."
        if gap < SMALL_GAP:
            log.warning("preflight: the teacher is better by only %.3f nats per token; expect little from it", gap)
        return ""

    def _common_ground(
        self, teacher: TeacherSignal, found: TeacherLoss, targets: float, teacher_nats: float, student_nats: float
    ) -> str:
        """Some tokens of two tokenizers begin at the same byte; both losses are counted per byte."""
        matched = teacher.matched.sum().unsqueeze(0)
        spelled = torch.tensor([found.scored, found.total], device=matched.device)
        sums = torch.cat([matched, spelled]).to(widest_float(matched.device))
        common, of_teacher, of_targets = self.student.over_ranks(sums).tolist()
        if not common or not of_teacher:
            return "No token of the teacher begins where a target of the student does: it has nothing to learn from."
        log.info(
            "preflight: teacher %.3f nats per byte, student %.3f; "
            "%.0f %% of the targets begin a token of the teacher too",
            teacher_nats / of_targets,
            student_nats / of_targets,
            100 * common / targets,
        )
        return ""

    def gradient(self, batch: Batch, teacher: TeacherSignal) -> str:
        """The divergence has a gradient in the student, equal to its slope, and at targets only."""
        labels = batch.labels.flatten()
        kept = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        teacher = teacher.at_targets(kept)
        probed = teacher.matched.nonzero().squeeze(1)[:PROBED].to(kept.device)
        targets, teacher = kept[probed], teacher.select(probed).in_fp32()
        masked = labels[targets].clone()
        masked[::2] = IGNORE_INDEX  # half of them count as padding

        def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return hidden.flatten(0, 1)[targets].float(), weight.float().clone()  # FSDP takes the weight away again

        with self.student.trainer.precision_plugin.forward_context(), torch.no_grad():
            hidden, weight = self.student.backbone(batch.input_ids, head, batch.spans)  # (PROBED, D), (V, D)
        if len(targets) < 2:  # a small validation split has none for this rank; another rank checks
            return ""
        term = DistillationTerm(teacher, replace(self.loss, hard_weight=0.0), self.mixing)
        mixing, vocab_size = term.mixing_on(hidden.device), len(self.student.tokenizer)

        def value(at: Tensor) -> Tensor:
            given = lm_head_loss(
                at, weight, masked, teacher=term.teacher, loss=term.loss, mixing=mixing, vocab_size=vocab_size
            )
            return given.total

        with torch.autocast(self.student.device.type, enabled=False), torch.enable_grad():
            return _slope_problem(value, hidden, self.loss)


def _slope_problem(value: Callable[[Tensor], Tensor], hidden: Tensor, loss: LossSettings) -> str:
    """Compare a divergence's gradient with its slope along that gradient; every other row counts as padding.

    Args:
        value: from hidden states (n, D) to the divergence ().
    """
    at = hidden.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(at), at)
    if not gradient.norm() > 0:
        return "The divergence from the teacher has no gradient in the student: it would learn nothing from it."
    if gradient[::2].abs().max() > 0:
        return "Positions without a target, such as padding, have a gradient in the student."
    if loss.name == "taid":  # its target moves with the student and is taken as constant
        return ""
    step = 0.01 * hidden.norm() * gradient / gradient.norm()
    slope = (value(hidden + step) - value(hidden - step)) / (2 * step.norm())
    if not abs(slope / gradient.norm() - 1) < SLOPE_TOLERANCE:
        return f"The divergence has the slope {slope:.3g}, but its gradient has the norm {gradient.norm():.3g}."
    return ""
