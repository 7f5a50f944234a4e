"""Distill: a student learns from a larger teacher's whole next-token distribution, mixed with the labels."""

import logging
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from gpt2lab import metric_names
from gpt2lab.backbone import Backbone
from gpt2lab.batch import IGNORE_INDEX, Batch
from gpt2lab.errors import InputError
from gpt2lab.hidden_states import cosine_distance, squared_distance
from gpt2lab.lm_head_loss import LMHeadLoss, lm_head_loss
from gpt2lab.settings import LossSettings, TrainingSettings
from gpt2lab.student_init import CALIBRATION_SAMPLES, student_from_teacher
from gpt2lab.student_shape import TEACHER_LAYERS
from gpt2lab.taid import AdaptiveMixing
from gpt2lab.teacher import OnlineTeacher
from gpt2lab.teacher_signal import DenseTeacher, TeacherSignal
from gpt2lab.tokenizer import differing_tokens, load_tokenizer
from lightning_modules.language_model import LanguageModel, Teaching

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
    """

    teacher: OnlineTeacher  # loaded with the student's model, which may be cut out of it

    def __init__(self, training: TrainingSettings, teacher: str, loss: LossSettings, preflight: str = "refuse") -> None:
        super().__init__(training)
        self.teacher_source = teacher
        self.loss_settings = loss
        self.preflight = preflight
        self.mixing = AdaptiveMixing(loss, training.steps)
        self.teacher_loss: float | None = None

    def on_fit_start(self) -> None:
        self.teacher.to(self.device, TEACHER_DTYPES.get(str(self.trainer.precision), torch.float32))
        if not self.tokens_seen:  # a run taken up again was let in when it started
            self._check_teacher()

    def build_backbone(self) -> Backbone:
        self.teacher = OnlineTeacher(self.teacher_source)
        backbone = self._cut_out() if self.settings.init == TEACHER_LAYERS else super().build_backbone()
        width = self.teacher.backbone.shape.n_embd
        if self.compares_hidden_states and width != backbone.shape.n_embd:
            backbone.add_projection(width)
        return backbone

    def _cut_out(self) -> Backbone:
        """The student with its first weights out of the teacher, the same on every rank."""
        self.teacher.to(self.trainer.strategy.root_device, torch.float32)
        calibration = self.trainer.datamodule.calibration_batches(CALIBRATION_SAMPLES)
        return student_from_teacher(self.teacher.backbone, self.settings.shape, calibration)

    @property
    def compares_hidden_states(self) -> bool:
        """Whether the loss has terms on the last hidden states beside the divergence."""
        return bool(self.loss_settings.hidden_cosine or self.loss_settings.hidden_mse)

    def loss(self, batch: Batch) -> LMHeadLoss:
        return self.head_loss(
            batch,
            Teaching(
                self.teacher.signal(batch.input_ids),
                self.loss_settings,
                mixing=torch.tensor(self.mixing.share, device=self.device),
                further=self._hidden_distance if self.compares_hidden_states else None,
            ),
        )

    def _hidden_distance(self, hidden: Tensor, labels: Tensor, signal: TeacherSignal) -> Tensor:
        """Weighted distances of the last hidden states, summed over the targets."""
        assert isinstance(signal, DenseTeacher)
        mapped = self.backbone.projection(hidden) if self.backbone.projection is not None else hidden
        settings, kept = self.loss_settings, labels != IGNORE_INDEX
        total = hidden.new_zeros(())
        if settings.hidden_cosine:
            total = total + settings.hidden_cosine * cosine_distance(mapped, signal.hidden, kept)
        if settings.hidden_mse:
            total = total + settings.hidden_mse * squared_distance(mapped, signal.hidden, kept)
        return total

    def after_step(self) -> None:
        if self.loss_settings.name == "taid":
            self.mixing.update(self.trainer.global_step, self.step_objective())

    def training_losses(self, objective: Tensor, cross_entropy: Tensor) -> dict[str, Tensor]:
        return {metric_names.TRAIN_LOSS: cross_entropy, metric_names.TRAIN_OBJECTIVE: objective}

    def validation_sums(self, batch: Batch) -> dict[str, Tensor]:
        result = self.loss(batch)
        squared = self.loss_settings.temperature**2 if self.loss_settings.scale_t2 else 1.0
        return {metric_names.VAL_LOSS: result.cross_entropy, metric_names.DISTILL_KL: result.divergence / squared}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["teacher_loss"] = self.teacher_loss
        checkpoint["taid"] = self.mixing.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.teacher_loss = checkpoint["teacher_loss"]
        self.mixing.load(checkpoint["taid"])

    def facts_for_report(self) -> dict[str, Any]:
        return {"teacher": {"source": self.teacher_source, "val_loss": self.teacher_loss}}

    # Preflight: is this teacher able to teach this student?

    def _check_teacher(self) -> None:
        sizes = {"teacher": self.teacher.backbone.shape.vocab_size, "student": self.backbone.shape.vocab_size}
        entries = len(self.tokenizer)
        if sizes["teacher"] < entries:
            raise InputError(
                f"The teacher {self.teacher_source} has {sizes['teacher']} vocabulary entries, "
                f"the tokenizer of this run {entries}.\n"
                "Both must use one tokenizer: leave tokenizer=auto, or train the teacher with the student's tokenizer."
            )
        for whose, size in sizes.items():
            if size > entries:
                log.info(
                    "preflight: %d entries of the %s's vocabulary mean no token and are cut", size - entries, whose
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
