"""LanguageModel: what pretraining, distillation and fine-tuning share — step, optimizer, validation, logging.

A task states only how it builds its backbone and what its loss on a batch is. Losses are sums; the step divides them by
the number of target tokens of the whole global batch, so one rank with 32 sequences, 4 micro-batches of 8 and two ranks
of 16 give the same gradient, without dropout: each rank and micro-batch draws its own masks.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GPT2LMHeadModel

from gpt2lab import metric_names
from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.data.document_groups import DOCUMENT_NATS, DOCUMENT_TARGETS, document_sums, warn_of_few_groups
from gpt2lab.evaluation.document_losses import DocumentLosses
from gpt2lab.losses.lm_head_loss import LMHeadLoss, lm_head_loss
from gpt2lab.losses.sampled_softmax import NegativeSampler, log_uniform, sampled_softmax_loss, unigram
from gpt2lab.losses.target_losses import target_losses
from gpt2lab.losses.teacher_signal import TeacherSignal
from gpt2lab.model.backbone import Backbone
from gpt2lab.optim.optimizers import build_optimizer
from gpt2lab.optim.schedules import learning_rate_factor
from gpt2lab.reports.run_texts import Example
from gpt2lab.settings import LossSettings, TrainingSettings
from gpt2lab.system.device import copied_to, seed_random_state, widest_float
from gpt2lab.system.run_time import forward_share
from lightning_modules.backbone_module import BackboneModule

ROWS_MULTIPLE = 64  # of the LM head's rows; oneDNN keeps memory for each number of rows in bf16


@dataclass(frozen=True)
class DistillationTerm:
    """A teacher's part of a batch's loss.

    Attributes:
        teacher: its distributions at all of the batch's positions, or at the targets only.
        loss: the divergence, its weight beside the cross-entropy, and weights of the distances of hidden states.
        mixing: TAID's share of the teacher.
        projection: from the student's hidden width to the teacher's, for these distances; None: the widths are equal.
    """

    teacher: TeacherSignal
    loss: LossSettings
    mixing: float = 1.0
    projection: nn.Module | None = None

    def mixing_on(self, device: torch.device) -> Tensor:
        """TAID's share () as a tensor, so that a compiled loss is not compiled again at each step."""
        return torch.full((), self.mixing, device=device)

    def hidden_distance(self, hidden: Tensor, teacher: TeacherSignal, kept: Tensor) -> Tensor:
        """Weighted sum () of two distances of last hidden states, student's (N, D) and teacher's, at kept positions.

        They are 1 − cos, as in DistilBERT (arXiv 1910.01108), and the mean squared difference.
        """
        mapped = hidden if self.projection is None else self.projection(hidden)
        total, ours, theirs = mapped.new_zeros(()), mapped.float(), teacher.hidden_states.float()  # (N, Dt)
        if self.loss.hidden_cosine:
            distances = 1 - F.cosine_similarity(ours, theirs, dim=1)
            total = total + self.loss.hidden_cosine * torch.where(kept, distances, 0.0).sum()
        if self.loss.hidden_mse:
            squares = (ours - theirs).square().mean(1)
            total = total + self.loss.hidden_mse * torch.where(kept, squares, 0.0).sum()
        return total


class LanguageModel(BackboneModule):
    """Base of the three tasks; its own loss is next-token cross-entropy."""

    def __init__(self, training: TrainingSettings) -> None:
        super().__init__(training)
        self.negatives: NegativeSampler | None = None  # with objective=sampled_softmax
        self.tokens_seen = 0
        self.elapsed: Callable[[], float] = lambda: 0.0  # seconds of the run until now; the report measures them
        self.watched_metric = metric_names.VAL_LOSS
        self._step_sums = torch.zeros(2)  # objective and cross-entropy of this step's micro-batches, on this rank
        self._step_indices: list[Tensor] = []
        self.step_targets = 0  # of the global batch of the step at work, or of the last one
        self.validation_is_due = False  # after the last step: a stop kept it from being made or finished
        self.is_updating = False  # from a change of the weights until all callbacks have seen the step
        self.logger_error: Exception | None = None  # of an added logger within a step, raised once that is saved
        self._validation_sums: dict[str, Tensor] = {}
        self.validation_documents: DocumentLosses | None = None  # of the last validation, on every rank
        self.validation_errors: dict[str, float] = {}  # standard errors of its scores of generated text
        self.validation_examples: list[Example] = []  # generated in the last validation, on every rank
        self._gradient_norm = torch.zeros(())
        self._measured: dict[str, list[str]] = {}  # kind of metrics → names of those measured last

    # What a task may state for itself

    def loss(self, batch: Batch) -> LMHeadLoss:
        """Training loss of one micro-batch, as sums over its targets."""
        return self.lm_head_loss(batch) if self.negatives is None else self._sampled_loss(batch, self.negatives)

    def training_losses(self, objective: Tensor, cross_entropy: Tensor) -> dict[str, Tensor]:
        """Return the logged losses of a step, from its two means per target token."""
        return {metric_names.TRAIN_LOSS: cross_entropy}

    def validation_sums(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over the batch's targets, of any shape; they are added over the whole validation and over ranks."""
        return self.cross_entropy_sums(self.backbone, batch)

    def cross_entropy_sums(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Loss sums () over the batch's targets, and by document where those are known, of any weights."""
        kept = batch.labels != IGNORE_INDEX  # (B, T)

        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            vocab_size, compiled = len(self.tokenizer), self.settings.compile_head
            return target_losses(hidden[kept], weight, batch.labels[kept], vocab_size, compiled)

        nats = backbone(batch.input_ids, head, batch.spans)  # (targets,)
        sums = {metric_names.VAL_LOSS: nats.to(widest_float(nats.device)).sum()}
        return sums if batch.documents is None else {**sums, **document_sums(nats, batch.documents)}

    def after_step(self) -> None:
        """Update the state of a task after the weights have changed; `step_objective` is that step's."""

    def validation_figures(self, sums: dict[str, Tensor], targets: float) -> dict[str, float]:
        """Figures by metric name, val/loss among them, from the sums over the whole split's targets."""
        return {name: value.item() / targets for name, value in sums.items()}

    def forward_share(self) -> float:
        """Return the cost of a validation, as a share of a training step on the same tokens."""
        return forward_share(1)

    def live_teacher(self) -> tuple[GPT2LMHeadModel | None, str]:
        """Return a loaded teacher with this model's tokenizer, and its source, for pages that show both models."""
        return None, ""

    def facts_for_report(self) -> dict[str, Any]:
        """Return the fields of the report beyond the common ones."""
        return {}

    # The loss of a batch

    def lm_head_loss(self, batch: Batch, term: DistillationTerm | None = None) -> LMHeadLoss:
        """LM-head loss of one micro-batch: cross-entropy, or mixed with a divergence from a teacher."""
        few_targets = batch.few_targets or (term is not None and term.teacher.rows < batch.labels.numel())

        def head(hidden: Tensor, weight: Tensor) -> LMHeadLoss:
            rows, labels = hidden.flatten(0, 1), batch.labels.flatten()
            teacher = term.teacher if term else None
            if few_targets:
                targets = batch.head_rows(1 if teacher and teacher.only_targets else ROWS_MULTIPLE)
                rows, labels = rows[targets], labels[targets]
                teacher = teacher.at_targets(targets) if teacher else None
            result = lm_head_loss(
                rows,
                weight,
                labels,
                teacher=teacher,
                loss=term.loss if term else None,
                hard=self.settings.cross_entropy,
                mixing=term.mixing_on(rows.device) if term else None,
                vocab_size=len(self.tokenizer),
                compiled=self.settings.compile_head,
            )
            if term is None or teacher is None or not term.loss.compares_hidden_states:
                return result
            return replace(result, total=result.total + term.hidden_distance(rows, teacher, labels != IGNORE_INDEX))

        return self.backbone(batch.input_ids, head, batch.spans)

    def _sampled_loss(self, batch: Batch, negatives: NegativeSampler) -> LMHeadLoss:
        """Cross-entropy over the targets and this step's negatives, which all micro-batches and ranks share."""
        token_ids = copied_to(negatives.sample(self.trainer.global_step), self.device)

        def head(hidden: Tensor, weight: Tensor) -> LMHeadLoss:
            rows, labels = hidden.flatten(0, 1), batch.labels.flatten()
            if batch.few_targets:
                targets = batch.head_rows(1)
                rows, labels = rows[targets], labels[targets]
            return sampled_softmax_loss(rows, weight, labels, token_ids, negatives.log_expected)

        return self.backbone(batch.input_ids, head, batch.spans)

    # Training

    def on_train_start(self) -> None:
        objective = self.settings.objective
        if objective.kind.samples_softmax:
            self.negatives = NegativeSampler(self._distribution(), objective.negatives, self.settings.seed, self.device)
        self._set_learning_rates()
        if self.validation_is_due:
            self._validate_now()

    def _set_learning_rates(self) -> None:
        """Set the next step's learning rates; a checkpoint holds those of a schedule with its own number of steps."""
        for config in self.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            groups = scheduler.optimizer.param_groups
            for group, peak, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
                group["lr"] = peak * factor(scheduler.last_epoch)

    def _validate_now(self) -> None:
        """Make up for the validation that was due when the run was stopped. All callbacks have started by now."""
        loop = self.trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        self.trainer.validating = True
        loop.run()
        self.trainer.training = True

    def abandon_validation(self) -> None:
        """Discard an interrupted validation; the resumed run repeats it."""
        self.validation_is_due = True
        if self.average is not None and self.average.is_applied:
            self.average.swap()

    def _distribution(self) -> Tensor:
        if self.settings.objective.distribution == "log_uniform":
            return log_uniform(len(self.tokenizer))
        return unigram(torch.from_numpy(self.trainer.datamodule.token_counts()))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(
            self.backbone.named_parameters(),
            self.settings.optimizer,
            fused=self.trainer.precision != "16-mixed",
            seed=self.settings.seed,
            replicas=torch.distributed.group.WORLD if self.trainer.world_size > 1 and not self.is_sharded else None,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, self.settings.steps, self.settings.schedule)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._seed_dropout(batch_idx)
        result = self.loss(batch)
        sums = torch.stack([result.total.detach(), result.cross_entropy])
        self._step_sums = self._step_sums.to(self.device) + sums
        self._step_indices.append(batch.indices)
        self.step_targets = batch.target_tokens
        # Lightning divides by the accumulation and DDP and FSDP2 average over ranks: undo both, divide once by N.
        return result.total * (self.trainer.accumulate_grad_batches * self.trainer.world_size / batch.target_tokens)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.finite.check()  # the step before: its numbers are there by now
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, self.settings.gradient_clip or math.inf)
        self._gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # With fp16 an overflowing gradient is normal: the scaler skips the step and lowers its scale.
        watched = self._step_sums[0] if self.trainer.precision == "16-mixed" else self._gradient_norm
        self.finite.note(watched, self.trainer.global_step + 1, self._step_indices)
        self.is_updating = True

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Here and not at the end of the batch, where callbacks come before the module: they read, save and report
        # these. The learning rate is still this step's: the schedule moves after the step.
        self.tokens_seen += self.step_targets
        self.after_step()
        if self.average is not None:
            self.average.update()
        self._log_step(self.trainer.global_step + 1)  # Lightning counts the step after this hook

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        self._step_sums = torch.zeros_like(self._step_sums)
        self._step_indices = []
        self.is_updating = False
        if self.logger_error is not None:
            raise self.logger_error

    def on_train_end(self) -> None:
        self.finite.check()

    def step_objective(self) -> float:
        """Mean objective per target token of the step just made, over all ranks."""
        return (self.over_ranks(self._step_sums)[0] / self.step_targets).item()

    def _log_step(self, step: int) -> None:
        """Log step number `step` where it is due; the first step's metrics go to callbacks only (progress bar)."""
        is_logged = step % self.settings.log_every == 0 or step == self.settings.steps
        if not is_logged and step != 1:
            return
        self.finite.check()
        objective, cross_entropy = self.over_ranks(self._step_sums) / self.step_targets
        metrics = {
            **self.training_losses(objective, cross_entropy),
            metric_names.LEARNING_RATE: self.trainer.optimizers[0].param_groups[-1]["lr"],
            metric_names.GRAD_NORM: self._gradient_norm,
            metric_names.TOKENS: float(self.tokens_seen),
        }
        self.log_measured("train", step, metrics, to_loggers=is_logged)

    def log_measured(
        self, kind: str, step: int, metrics: Mapping[str, Tensor | float], to_loggers: bool = True
    ) -> None:
        """Write metrics measured at optimizer step `step` to the loggers and to `trainer.callback_metrics`.

        Lightning's own `log_dict` repeats the last value of a metric at later steps that did not measure it.

        Args:
            kind: train, speed or validation; metrics of this kind that were not measured again are dropped from
                `trainer.callback_metrics`.
        """
        values = {name: float(value) for name, value in metrics.items()}
        self.drop_measured(kind)
        self._measured[kind] = list(values)
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        row = {**values, metric_names.TOKENS: float(self.tokens_seen), metric_names.SECONDS: round(self.elapsed(), 2)}
        for logger in self.trainer.loggers if to_loggers else []:
            try:
                logger.log_metrics(row, step)
            except Exception as error:
                is_added = type(logger).__module__.partition(".")[0] != "callbacks"
                if not (is_added and self.is_updating):  # a step without its row in metrics.csv is made again
                    raise
                self.logger_error = self.logger_error or error

    def drop_measured(self, kind: str) -> None:
        """Remove metrics of this kind from `trainer.callback_metrics`."""
        for name in self._measured.pop(kind, []):
            self.trainer.callback_metrics.pop(name, None)

    def _seed_dropout(self, batch_idx: int) -> None:
        """Dropout draws from (seed, step, rank, micro-batch), so a resumed run draws what an unbroken one draws."""
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        position = (self.trainer.global_step * self.trainer.world_size + self.trainer.global_rank) * 4096 + micro_batch
        seed_random_state(self.device, (self.settings.seed * 0x9E3779B97F4A7C15 + position) % 2**63)

    # Validation

    def on_validation_epoch_start(self) -> None:
        self.finite.check()
        self.drop_measured("validation")
        self._validation_sums = {}
        if self.average is not None:
            self.average.swap()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        dtype = widest_float(self.device)
        for name, value in {**self.validation_sums(batch), "targets": torch.tensor(float(batch.target_tokens))}.items():
            self._validation_sums[name] = self._validation_sums.get(name, 0) + value.detach().to(self.device, dtype)

    def on_validation_epoch_end(self) -> None:
        sums = {name: self.over_ranks(value) for name, value in self._validation_sums.items()}
        targets = sums.pop("targets").item()
        self.validation_documents = None
        if DOCUMENT_NATS in sums:
            nats, counts = sums.pop(DOCUMENT_NATS), sums.pop(DOCUMENT_TARGETS)
            self.validation_documents = DocumentLosses.of(nats, counts)
            warn_of_few_groups(torch.tensor(self.validation_documents.targets))
        figures = self.validation_figures(sums, targets)
        loss = figures[metric_names.VAL_LOSS]
        figures[metric_names.VAL_PERPLEXITY] = math.exp(min(loss, 100.0))
        if self.settings.val_bytes:  # unknown for tokens whose tokenizer is not at hand
            bits = loss * self.settings.val_tokens / math.log(2)
            figures[metric_names.VAL_BITS_PER_BYTE] = bits / self.settings.val_bytes
        self.log_measured("validation", self.trainer.global_step, {**figures, **self.generated_metrics()})
        self.validation_is_due = False
        if self.average is not None:
            self.average.swap()

    def generated_metrics(self) -> dict[str, float]:
        """Metrics on generated text, for tasks that have them."""
        return {}

    def over_ranks(self, value: Tensor) -> Tensor:
        """The sum of every rank's value."""
        if self.trainer.world_size == 1:
            return value
        value = value.clone()
        torch.distributed.all_reduce(value)
        return value

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.finite.check()
        checkpoint["tokens_seen"] = self.tokens_seen
        checkpoint["validation_is_due"] = self.validation_is_due
        if not self.is_updating:  # perhaps within a micro-batch of the next step
            for counts in _batch_counts(checkpoint):
                counts.update(dict.fromkeys(("ready", "started", "completed"), counts["processed"]))
        if self.average is not None:
            checkpoint["weight_average"] = self.average.state(whole=not self.saves_shards)
            checkpoint["averaged"] = [name for name, _ in self.backbone.named_parameters()]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens_seen = checkpoint["tokens_seen"]
        self.validation_is_due = checkpoint.get("validation_is_due", False)
        if self.average is not None:
            self.average.load(checkpoint["weight_average"])
        if not self.has_trainer:
            return
        # Lightning counts micro-batches; a run may continue with another number of them in a step, and one that was
        # stopped within a step makes that step again from its first micro-batch.
        total, current = _batch_counts(checkpoint)
        shift = checkpoint["global_step"] * self.trainer.accumulate_grad_batches - total["processed"]
        for counts in (total, current):
            counts.update({name: count + shift for name, count in counts.items()})


def _batch_counts(checkpoint: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Lightning's counts of micro-batches, of the whole run and of its epoch."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return progress["total"], progress["current"]
