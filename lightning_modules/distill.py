"""Distill: a student learns from a larger teacher's whole next-token distribution, mixed with the labels."""

import logging
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from gpt2lab import metric_names
from gpt2lab.batch import Batch
from gpt2lab.distillation_metrics import distillation_sums, figures, gap_closed
from gpt2lab.errors import InputError
from gpt2lab.lm_head_loss import LMHeadLoss, lm_head_loss
from gpt2lab.settings import LossSettings, TrainingSettings
from gpt2lab.teacher import OnlineTeacher
from gpt2lab.tokenizer import differing_tokens, load_tokenizer
from lightning_modules.language_model import LanguageModel

log = logging.getLogger(__name__)

PREFLIGHT_BATCHES = 4
TEACHER_DTYPES = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}


class Distill(LanguageModel):
    """hard_weight · CE + (1 − hard_weight) · T² · KL(teacher ‖ student), in one pass over the LM head.

    Args:
        training: as for every task.
        teacher: run directory, Hugging Face folder or Hub id.
        loss: temperature, whether T² is kept, weight of the labels.
        preflight: refuse, warn or off: what to do when this teacher cannot teach this student.
        baseline_loss: val/loss of the same student trained without a teacher, for distill/gap_closed; None: unknown.
    """

    teacher: OnlineTeacher  # loaded when fitting starts

    def __init__(
        self,
        training: TrainingSettings,
        teacher: str,
        loss: LossSettings,
        preflight: str = "refuse",
        baseline_loss: float | None = None,
    ) -> None:
        super().__init__(training)
        self.teacher_source = teacher
        self.loss_settings = loss
        self.preflight = preflight
        self.baseline_loss = baseline_loss
        self.teacher_loss: float | None = None

    def on_fit_start(self) -> None:
        self.teacher = OnlineTeacher(self.teacher_source)
        self.teacher.to(self.device, TEACHER_DTYPES.get(str(self.trainer.precision), torch.float32))
        if not self.tokens_seen:  # a run taken up again was let in when it started
            self._check_teacher()

    def loss(self, batch: Batch) -> LMHeadLoss:
        return self.head_loss(batch, self.teacher.signal(batch.input_ids), self.loss_settings)

    def training_losses(self, objective: Tensor, cross_entropy: Tensor) -> dict[str, Tensor]:
        return {metric_names.TRAIN_LOSS: cross_entropy, metric_names.TRAIN_OBJECTIVE: objective}

    def validation_sums(self, batch: Batch) -> dict[str, Tensor]:
        signal, labels = self.teacher.signal(batch.input_ids), batch.labels.flatten()

        def head(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
            return distillation_sums(
                hidden.flatten(0, 1),
                weight,
                labels,
                signal,
                vocab_size=len(self.tokenizer),
                compiled=self.settings.compile_head,
            )

        return self.backbone(batch.input_ids, head)

    def validation_figures(self, sums: dict[str, Tensor], targets: float) -> dict[str, float]:
        found = figures(sums, targets)
        self.teacher_loss = found[metric_names.DISTILL_TEACHER_LOSS]
        if self.baseline_loss is not None:
            closed = gap_closed(self.baseline_loss, found[metric_names.VAL_LOSS], self.teacher_loss)
            if closed is None:
                log.warning("The baseline is no worse than the teacher, so there is no gap to close.")
            else:
                found[metric_names.DISTILL_GAP_CLOSED] = closed
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["teacher_loss"] = self.teacher_loss

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.teacher_loss = checkpoint["teacher_loss"]

    def facts_for_report(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"teacher": {"source": self.teacher_source, "val_loss": self.teacher_loss}}
        return facts if self.baseline_loss is None else {**facts, "baseline": {"val_loss": self.baseline_loss}}

    # Preflight: is this teacher able to teach this student?

    def _check_teacher(self) -> None:
        teacher_size, size = self.teacher.backbone.shape.vocab_size, self.backbone.shape.vocab_size
        if teacher_size != size:
            raise InputError(
                f"The teacher {self.teacher_source} has {teacher_size} vocabulary entries, the student {size}.\n"
                "Both must use one tokenizer: leave tokenizer=auto, or train the teacher with the student's tokenizer."
            )
        if self.preflight == "off":
            return
        for problem in (self._token_id_problem(), self._loss_problem()):
            if problem and self.preflight == "refuse":
                raise InputError(f"{problem}\nGive a better teacher, or go on all the same with preflight=warn.")
            if problem:
                log.warning("preflight: %s", problem)

    def _token_id_problem(self) -> str:
        """Why the two would number the same text differently, or nothing."""
        try:
            teacher_tokenizer = load_tokenizer(self.teacher_source)
        except InputError:
            return f"The teacher {self.teacher_source} holds no tokenizer, so its token ids may mean other text."
        different = differing_tokens(teacher_tokenizer, self.tokenizer)
        return f"Teacher and student number tokens differently, for example {different}." if different else ""

    @torch.no_grad()
    def _loss_problem(self) -> str:
        """Why the teacher has nothing to teach: its loss on validation text against the student's, or nothing."""
        teacher_sum, student_sum, targets = 0.0, 0.0, 0
        with self.trainer.precision_plugin.forward_context():
            for host_batch in islice(self.trainer.datamodule.val_dataloader(), PREFLIGHT_BATCHES):
                batch = self.transfer_batch_to_device(host_batch, self.device, 0)
                signal = self.teacher.signal(batch.input_ids)
                labels = batch.labels.flatten()
                teacher_sum += lm_head_loss(signal.hidden, signal.weight, labels).total.item()
                student_sum += self.head_loss(batch).total.item()
                targets += batch.target_tokens
        self.teacher_loss = teacher_sum / targets
        student_loss = student_sum / targets
        log.info(
            "preflight: teacher %.3f nats per token, student %.3f before training", self.teacher_loss, student_loss
        )
        if self.teacher_loss < student_loss:
            return ""
        return f"The teacher's loss {self.teacher_loss:.3f} is not below the student's {student_loss:.3f} on this data."
