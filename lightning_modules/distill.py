"""Distill: a student learns from a larger teacher's whole next-token distribution, mixed with the labels."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from gpt2lab import metric_names
from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.data.tokenizer import difference_in_words, load_tokenizer
from gpt2lab.distillation.init_from_teacher import CALIBRATION_SAMPLES, student_from_teacher
from gpt2lab.distillation.teacher import TEACHER_DTYPES, OnlineTeacher
from gpt2lab.distillation.teacher_cache import cache_sides
from gpt2lab.distillation.tokenizer_alignment import Alignment
from gpt2lab.errors import InputError
from gpt2lab.evaluation.distillation_metrics import distillation_sums, figures, gap_closed
from gpt2lab.evaluation.uld_metrics import uld_figures, uld_sums
from gpt2lab.losses.hidden_state_losses import cosine_distance, squared_distance
from gpt2lab.losses.lm_head_loss import LMHeadLoss
from gpt2lab.losses.taid import AdaptiveMixing
from gpt2lab.losses.teacher_signal import AlignedTeacher, DenseTeacher, TeacherSignal, TopKTeacher
from gpt2lab.model.backbone import Backbone
from gpt2lab.model.student_shape import TEACHER_LAYERS
from gpt2lab.settings import LossSettings, SequenceSettings, TeacherCacheSettings, TrainingSettings
from gpt2lab.storage.model_folder import read_shape
from lightning_modules import distill_preflight
from lightning_modules.language_model import LanguageModel, Teaching
from lightning_modules.on_policy_batches import StudentText

log = logging.getLogger(__name__)

# Lightning's names
PRECISIONS = {"32-true": "fp32", "bf16-mixed": "bf16", "bf16-true": "bf16_true", "16-mixed": "fp16", "64-true": "fp64"}


class Distill(LanguageModel):
    """hard_weight · CE + (1 − hard_weight) · T² · KL(teacher ‖ student), in one pass over the LM head.

    Args:
        training: as for every task.
        teacher: run directory, Hugging Face folder or Hub id.
        loss: temperature, whether T² is kept, weight of the labels.
        preflight: refuse, warn or off: what to do when this teacher cannot teach this student.
        cache: folder with what the teacher says of these data; empty: it is loaded and asked.
        cached: what is kept there.
        baseline_loss: val/loss of the same student trained without a teacher, for distill/gap_closed; None: unknown.
        sequences: whose text is trained on; None: the data's.
        context: the most tokens of a sequence that the student writes.
        shard_teacher: with strategy=fsdp, split the teacher over the ranks too.
    """

    teacher: OnlineTeacher  # loaded with the student's model, unless what it says is cached
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
        if cached and cached.name == "topk" and not cached.tail and loss.is_reverse_kl:
            raise InputError(
                f"loss={loss.name} is infinite where the teacher has probability 0, as with teacher_cache.tail=false.\n"
                "Use teacher_cache.tail=true, or another loss."
            )
        self.teacher_source = teacher
        self.loss_settings = loss
        self.preflight = preflight
        entries = len(self.tokenizer)
        self.cache = cache_sides(Path(cache), cached, entries) if cache and cached else {}
        self.mixing = AdaptiveMixing(loss, training.steps)
        self.baseline_loss = baseline_loss
        self.teacher_loss: float | None = None
        self.shard_teacher = shard_teacher
        self.step_is_students = False  # whether the step at work trains on text that the student wrote
        self.student_text: StudentText | None = None
        if sequences is not None and sequences.by_student:
            end_of_text = self.tokenizer.eos_token_id
            self.student_text = StudentText(sequences, context, training.steps, training.seed, end_of_text, entries)

    def on_fit_start(self) -> None:
        if not self.cache:
            if self.shard_teacher:
                self.teacher.backbone.to(self._teacher_dtype)
                self.teacher.shard(self.device_mesh["data_parallel"])
            self.teacher.to(self.device, self._teacher_dtype)

    def on_train_start(self) -> None:
        super().on_train_start()
        if not self.tokens_seen:  # a run taken up again was let in when it started
            self._check_teacher()

    def build_backbone(self) -> Backbone:
        shape, cut_out = read_shape(Path(self.teacher_source)), self.settings.init == TEACHER_LAYERS
        if self.loss_settings.name == "uld":
            theirs = load_tokenizer(self.teacher_source)
            self.alignment = Alignment(self.tokenizer, theirs, self.teacher_source, shape["n_positions"])
        if cut_out or not self.cache:
            self.teacher = OnlineTeacher(self.teacher_source, torch.float32 if cut_out else self._teacher_dtype)
        backbone = self._cut_out() if cut_out else super().build_backbone()
        if cut_out and self.cache:
            del self.teacher  # asked no more
        if self.compares_hidden_states and shape["n_embd"] != backbone.shape.n_embd:
            backbone.add_projection(shape["n_embd"], self.settings.seed)
        return backbone

    @property
    def _teacher_dtype(self) -> torch.dtype:
        return TEACHER_DTYPES[PRECISIONS[str(self.trainer.precision)]]

    def _cut_out(self) -> Backbone:
        """The student with its first weights out of the teacher, the same on every rank."""
        device = torch.device("cpu") if self.shard_teacher else self.trainer.strategy.root_device
        self.teacher.to(device, torch.float32)
        calibration = self.trainer.datamodule.calibration_batches(CALIBRATION_SAMPLES)
        return student_from_teacher(self.teacher.backbone, self.settings.shape, calibration)

    @property
    def compares_hidden_states(self) -> bool:
        """Whether the loss has terms on the last hidden states beside the divergence."""
        return bool(self.loss_settings.hidden_cosine or self.loss_settings.hidden_mse)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.student_text is not None:
            batch = self.student_text.in_place_of(batch, batch_idx % self.trainer.accumulate_grad_batches, self)
        self.step_is_students = batch.by_student
        return super().training_step(batch, batch_idx)

    def loss(self, batch: Batch) -> LMHeadLoss:
        if self.loss_settings.hard_weight == 1 and not self.compares_hidden_states and not batch.by_student:
            return self.head_loss(batch)  # the labels alone: the teacher's time is saved
        # What the student wrote is no label for it.
        settings = replace(self.loss_settings, hard_weight=0.0) if batch.by_student else self.loss_settings
        return self.head_loss(
            batch,
            Teaching(
                self.signal(batch, "train"),
                settings,
                mixing=self.mixing_tensor(),
                further=self._hidden_distance if self.compares_hidden_states else None,
            ),
        )

    def mixing_tensor(self) -> Tensor:
        """TAID's share of the teacher (); as a tensor, so that a compiled loss need not be compiled anew."""
        return torch.full((), self.mixing.share, device=self.device)

    def signal(self, batch: Batch, side: str) -> TeacherSignal:
        """What the teacher says of a batch of this side of the split, train or val."""
        if self.alignment is not None:
            return self.aligned_signal(self.alignment, batch)
        return self.cache[side].signal(batch) if self.cache else self.teacher.signal(batch.input_ids, batch.spans)

    def aligned_signal(self, alignment: Alignment, batch: Batch) -> AlignedTeacher:
        """What a teacher with a tokenizer of its own says of a batch."""
        return self.teacher.aligned_signal(alignment(batch).to(self.device), alignment.entries)

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
        if self.step_is_students:
            return {metric_names.TRAIN_OBJECTIVE: objective}
        return {metric_names.TRAIN_LOSS: cross_entropy, metric_names.TRAIN_OBJECTIVE: objective}

    def validation_sums(self, batch: Batch) -> dict[str, Tensor]:
        if self.alignment is not None:
            return self._sums_between_tokenizers(self.alignment, batch)
        signal, labels = self.signal(batch, "val"), batch.labels.flatten()
        assert isinstance(signal, DenseTeacher | TopKTeacher)  # a cache draws for training only

        def head(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
            return distillation_sums(
                hidden.flatten(0, 1),
                weight,
                labels,
                signal,
                vocab_size=len(self.tokenizer),
                compiled=self.settings.compile_head,
                documents=batch.documents,
            )

        sums = self.backbone(batch.input_ids, head, batch.spans)
        if self.cache:  # some labels are not among the stored entries, so the loss is stored too
            nats = self.cache["val"].nats(batch.indices.cpu().numpy())
            sums[metric_names.DISTILL_TEACHER_LOSS] = torch.tensor(nats)
        return sums

    def _sums_between_tokenizers(self, alignment: Alignment, batch: Batch) -> dict[str, Tensor]:
        signal, entries = self.aligned_signal(alignment, batch), len(self.tokenizer)

        def head(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
            compiled, labels = self.settings.compile_head, batch.labels.flatten()
            rows, documents = hidden.flatten(0, 1), batch.documents
            return uld_sums(rows, weight[:entries], labels, signal, compiled=compiled, documents=documents)

        return self.backbone(batch.input_ids, head)

    def validation_figures(self, sums: dict[str, Tensor], targets: float) -> dict[str, float]:
        found = figures(sums, targets) if self.alignment is None else uld_figures(sums, targets)
        self.teacher_loss = found[metric_names.DISTILL_TEACHER_LOSS]
        if self.student_text is not None:
            self.student_text.choice.validated(found[metric_names.VAL_LOSS])
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

    def live_teacher(self) -> tuple[GPT2LMHeadModel | None, str]:
        if self.cache or self.shard_teacher or self.alignment is not None:
            return None, ""
        return self.teacher.backbone.lm, self.teacher_source

    def facts_for_report(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"teacher": {"source": self.teacher_source, "val_loss": self.teacher_loss}}
        return facts if self.baseline_loss is None else {**facts, "baseline": {"val_loss": self.baseline_loss}}

    def _check_teacher(self) -> None:
        """Refuse or warn, as `preflight` says, before anything is trained."""
        sizes = {
            "teacher": read_shape(Path(self.teacher_source))["vocab_size"],
            "student": self.backbone.shape.vocab_size,
        }
        entries = {whose: len(self.tokenizer) for whose in sizes}
        if self.alignment is not None:
            entries["teacher"] = self.alignment.entries
        if sizes["teacher"] < entries["teacher"]:
            raise InputError(
                f"The teacher {self.teacher_source} has {sizes['teacher']} vocabulary entries, the tokenizer of "
                f"{'this run' if self.alignment is None else 'its own'} {entries['teacher']}."
                f"{'' if self.alignment else difference_in_words(Path(self.teacher_source), self.tokenizer)}\n"
                "Both must use one tokenizer: leave tokenizer=auto, or train the teacher with the student's tokenizer."
            )
        for whose, size in sizes.items():
            if size > entries[whose]:
                cut = size - entries[whose]
                log.info("preflight: %d entries of the %s's vocabulary mean no token and are cut", cut, whose)
        if self.preflight == "off":
            return
        for problem in distill_preflight.problems(self):
            if problem and self.preflight == "refuse":
                raise InputError(f"{problem}\nGive a better teacher, or go on all the same with preflight=warn.")
            if problem:
                log.warning("preflight: %s", problem)
