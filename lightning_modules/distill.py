"""Distill: train a student on a larger teacher's next-token distributions, mixed with the labels."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from gpt2lab import metric_names
from gpt2lab.data.batch import Batch
from gpt2lab.data.tokenizer import describe_difference, load_tokenizer
from gpt2lab.distillation.init_from_teacher import CALIBRATION_SAMPLES, student_from_teacher
from gpt2lab.distillation.teacher import OnlineTeacher
from gpt2lab.distillation.teacher_cache import cache_sides, check_stored
from gpt2lab.distillation.tokenizer_alignment import Alignment
from gpt2lab.errors import InputError
from gpt2lab.evaluation.distillation_metrics import distillation_sums, figures, gap_closed
from gpt2lab.evaluation.uld_metrics import uld_figures, uld_sums
from gpt2lab.losses.lm_head_loss import LMHeadLoss
from gpt2lab.losses.taid import AdaptiveMixing
from gpt2lab.losses.teacher_signal import TeacherSignal
from gpt2lab.model.backbone import Backbone
from gpt2lab.model.student_shape import TEACHER_LAYERS
from gpt2lab.plain_values import from_plain
from gpt2lab.settings import LossSettings, SequenceSettings, TeacherCacheSettings, TrainingSettings
from gpt2lab.storage.model_folder import read_shape, resolve_model_folder
from gpt2lab.system.device import named_dtype
from gpt2lab.system.run_time import forward_share
from lightning_modules.distill_preflight import Preflight
from lightning_modules.language_model import DistillationTerm, LanguageModel
from lightning_modules.on_policy_batches import StudentText

log = logging.getLogger(__name__)


class Distill(LanguageModel):
    """hard_weight · CE + (1 − hard_weight) · T² · KL(teacher ‖ student), in one pass over the LM head.

    Args:
        training: as for every task.
        teacher: run directory, Hugging Face folder or Hub id.
        loss: temperature, whether T² is kept, weight of the labels.
        preflight: refuse, warn or off: what to do when this teacher cannot teach this student.
        cache: folder with the teacher's stored distributions; empty: the teacher runs online.
        cached: what is stored there.
        baseline_loss: val/loss of the same student trained without a teacher, for distill/gap_closed; None: unknown.
        sequences: on-policy or off-policy text; None: the data's.
        context: the most tokens of a sequence that the student generates.
        shard_teacher: with strategy=fsdp, split the teacher over the ranks too.
    """

    alignment: Alignment | None = None  # with loss=uld: of the student's tokenizer with the teacher's

    def __init__(
        self,
        training: TrainingSettings,
        teacher: str,
        loss: LossSettings,
        preflight: str = "refuse",
        cache: str = "",
        cached: TeacherCacheSettings | None = None,
        baseline_loss: float | None = None,
        sequences: SequenceSettings | None = None,
        context: int = 0,
        shard_teacher: bool = False,
    ) -> None:
        super().__init__(training)
        self.loss_settings = loss = from_plain(LossSettings, loss)
        cached = from_plain(TeacherCacheSettings, cached) if cached else None
        sequences = from_plain(SequenceSettings, sequences) if sequences else None
        if cached:
            check_stored(cached, loss)
        self.teacher_source = teacher
        self._teacher: OnlineTeacher | None = None  # stays None where its distributions are cached
        self.preflight = preflight
        vocab_size = len(self.tokenizer)
        self.cache = cache_sides(Path(cache), cached, vocab_size) if cache and cached else {}
        self.mixing = AdaptiveMixing(loss, self.settings.steps)
        self.baseline_loss = baseline_loss
        self.teacher_loss: float | None = None
        self.shard_teacher = shard_teacher
        self.is_on_policy = False  # whether the current step trains on text that the student generated
        self.student_text: StudentText | None = None
        self._trained_shape: torch.Size | None = None  # (B, T) of the last training batch
        if sequences is not None and sequences.on_policy:
            end_of_text, steps, seed = self.tokenizer.eos_token_id, self.settings.steps, self.settings.seed
            self.student_text = StudentText(sequences, context, steps, seed, end_of_text, vocab_size)

    def on_fit_start(self) -> None:
        if not self.cache:
            if self.settings.compiled != "nothing" and self.device.type == "cuda":  # a CPU gains nothing
                self.teacher.backbone.compile_blocks()
            if self.shard_teacher:
                self.teacher.backbone.to(self._teacher_dtype)
                self.teacher.shard(self.device_mesh["data_parallel"])
            self.teacher.to(self.device, self._teacher_dtype)

    def on_train_start(self) -> None:
        super().on_train_start()
        if not self.tokens_seen:  # a resumed run was checked when it started
            self._check_teacher()

    @property
    def teacher(self) -> OnlineTeacher:
        """The online teacher, loaded when it is first read: before the student, or after `load_from_checkpoint`."""
        if self._teacher is None:
            self._teacher = OnlineTeacher(self.teacher_source, self._teacher_dtype)
        return self._teacher

    def build_backbone(self) -> Backbone:
        from_teacher = self.settings.init == TEACHER_LAYERS and self.has_trainer
        compares_hidden, aligns = self.loss_settings.compares_hidden_states, self.loss_settings.name == "uld"
        shape = read_shape(self._teacher_folder()) if compares_hidden or aligns else {}
        if aligns:
            theirs = load_tokenizer(self.teacher_source)
            self.alignment = Alignment(self.tokenizer, theirs, self.teacher_source, shape["n_positions"])
        if from_teacher or (self.has_trainer and not self.cache):
            self._teacher = OnlineTeacher(self.teacher_source, torch.float32 if from_teacher else self._teacher_dtype)
        backbone = self._student_from_teacher() if from_teacher else super().build_backbone()
        if from_teacher and self.cache:
            self._teacher = None  # not needed any more
        if compares_hidden and shape["n_embd"] != backbone.shape.n_embd:
            backbone.add_projection(shape["n_embd"], self.settings.seed)
        return backbone

    def _teacher_folder(self) -> Path:
        return resolve_model_folder(self.teacher_source, "teacher")

    @property
    def _teacher_dtype(self) -> torch.dtype:
        return named_dtype(self.settings.teacher_dtype)

    def _student_from_teacher(self) -> Backbone:
        """Return the student initialized from the teacher's weights, the same on every rank."""
        device = torch.device("cpu") if self.shard_teacher else self.trainer.strategy.root_device
        self.teacher.to(device, torch.float32)
        calibration = self.trainer.datamodule.calibration_batches(CALIBRATION_SAMPLES)
        return student_from_teacher(self.teacher.backbone, self.settings.shape, calibration)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.student_text is not None:
            batch = self.student_text.replace_on_policy(batch, batch_idx % self.trainer.accumulate_grad_batches, self)
        self.is_on_policy = batch.on_policy
        return super().training_step(batch, batch_idx)

    def loss(self, batch: Batch) -> LMHeadLoss:
        settings = self.loss_settings
        if batch.on_policy:  # the student's own text is no label
            settings = replace(settings, hard_weight=0.0)
        if settings.hard_weight == 1 and not settings.compares_hidden_states:
            return self.lm_head_loss(batch)  # labels only: spares the teacher's forward pass
        teacher = self.teacher_signal(batch, "train")
        return self.lm_head_loss(
            batch, DistillationTerm(teacher, settings, self.mixing.share, self.backbone.projection)
        )

    def teacher_signal(self, batch: Batch, side: str) -> TeacherSignal:
        """Return the teacher's distributions for a batch of this side of the split, train or val."""
        if self.alignment is not None:
            return self.teacher.aligned_signal(self.alignment(batch).to(self.device), self.alignment.vocab_size)
        if self.cache:
            return self.cache[side].signal(batch)
        shape = batch.input_ids.shape
        if side == "train":
            self._trained_shape = shape
        # Under "pass" all training batches have one shape; a graph compiled for another one would be slower for all.
        is_other = self.settings.compiled == "pass" and shape != self._trained_shape
        with torch.compiler.set_stance("force_eager") if is_other else nullcontext():
            return self.teacher.signal(batch.input_ids, batch.spans)

    def after_step(self) -> None:
        if self.loss_settings.name == "taid":
            self.mixing.update(self.trainer.global_step, self.step_objective())

    def training_losses(self, objective: Tensor, cross_entropy: Tensor) -> dict[str, Tensor]:
        if self.is_on_policy:
            return {metric_names.TRAIN_OBJECTIVE: objective}
        return {metric_names.TRAIN_LOSS: cross_entropy, metric_names.TRAIN_OBJECTIVE: objective}

    def validation_sums(self, batch: Batch) -> dict[str, Tensor]:
        teacher, labels = self.teacher_signal(batch, "val"), batch.labels.flatten()
        sums_of = distillation_sums if self.alignment is None else uld_sums

        def head(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
            return sums_of(
                hidden.flatten(0, 1),
                weight,
                labels,
                teacher,
                vocab_size=len(self.tokenizer),
                compiled=self.settings.compile_head,
                documents=batch.documents,
            )

        sums = self.backbone(batch.input_ids, head, batch.spans)
        if self.cache:  # some labels are not among the stored tokens, so the loss is stored too
            nats = self.cache["val"].nats(batch.indices.numpy())
            sums[metric_names.DISTILL_TEACHER_LOSS] = torch.tensor(nats)
        return sums

    def validation_figures(self, sums: dict[str, Tensor], targets: float) -> dict[str, float]:
        found = figures(sums, targets) if self.alignment is None else uld_figures(sums, targets)
        self.teacher_loss = found[metric_names.DISTILL_TEACHER_LOSS]
        if self.student_text is not None:
            self.student_text.choice.update(found[metric_names.VAL_LOSS])
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
        checkpoint["taid"] = self.mixing.state()
        checkpoint["student_text"] = self.student_text.state() if self.student_text is not None else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.teacher_loss = checkpoint["teacher_loss"]
        self.mixing.load(checkpoint["taid"])
        if self.student_text is not None:
            self.student_text.load(checkpoint["student_text"])

    def forward_share(self) -> float:
        if self.cache:
            return super().forward_share()
        sizes = (
            sum(weight.numel() for weight in model.parameters()) for model in (self.backbone, self.teacher.backbone)
        )
        return forward_share(*sizes)

    def live_teacher(self) -> tuple[GPT2LMHeadModel | None, str]:
        if self.cache or self.shard_teacher or self.alignment is not None:
            return None, ""
        return self.teacher.backbone.lm, self.teacher_source

    def facts_for_report(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"teacher": {"source": self.teacher_source, "val_loss": self.teacher_loss}}
        return facts if self.baseline_loss is None else {**facts, "baseline": {"val_loss": self.baseline_loss}}

    def _check_teacher(self) -> None:
        """Raise or warn, depending on `preflight`, before training starts."""
        sizes = {
            "teacher": read_shape(self._teacher_folder())["vocab_size"],
            "student": self.backbone.shape.vocab_size,
        }
        tokens = {model: len(self.tokenizer) for model in sizes}
        if self.alignment is not None:
            tokens["teacher"] = self.alignment.vocab_size
        if sizes["teacher"] < tokens["teacher"]:
            raise InputError(
                f"The teacher {self.teacher_source} has a vocabulary size of {sizes['teacher']}, the tokenizer of "
                f"{'this run' if self.alignment is None else 'its own'} {tokens['teacher']}."
                f"{'' if self.alignment else describe_difference(self._teacher_folder(), self.tokenizer)}\n"
                "Both must use one tokenizer: leave tokenizer=auto, or train the teacher with the student's tokenizer."
            )
        for model, size in sizes.items():
            if size > tokens[model]:
                padding = size - tokens[model]
                log.info("preflight: the %s's head has %d rows of padding, which are truncated", model, padding)
        if self.preflight == "off":
            return
        preflight = self.preflight_checks()
        with torch.compiler.set_stance("force_eager"):  # compiled for another shape, a graph would be dynamic
            for problem in preflight.problems():
                self.teacher_loss = preflight.teacher_loss
                if problem and self.preflight == "refuse":
                    raise InputError(f"{problem}\nGive a better teacher, or continue with preflight=warn.")
                if problem:
                    log.warning("preflight: %s", problem)

    def preflight_checks(self) -> Preflight:
        """Return the checks of this teacher, student and loss."""
        return Preflight(
            student=self,
            teacher_source=self.teacher_source,
            signal=lambda batch: self.teacher_signal(batch, "val"),
            loss=self.loss_settings,
            mixing=self.mixing.share,
            shares_tokenizer=self.alignment is None,
        )
