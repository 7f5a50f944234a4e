"""Twelve known bugs of distillation code are planted one by one; preflight or a named test detects each.

| bug | detected by |
|---|---|
| student missing from the KL | preflight: no gradient |
| padding unmasked | preflight: positions without a target pull |
| token ids clamped | preflight: the teacher's loss |
| shifted by one | preflight: the teacher's loss |
| teacher in training mode | preflight: its logits differ from call to call |
| dropout in the teacher | preflight: its logits differ from call to call |
| gradient of another loss than the value | preflight: the slope |
| T² missing | test_lm_head_loss: the dense twin |
| wrong labels for a chunk | test_lm_head_loss: the dense twin |
| vocabulary padded with zero logits | test_lm_head_loss: padding |
| mean of each micro-batch | test_training_modules: accumulation |
| teacher in the optimizer | below |
| stale cache | test_teacher_cache: another teacher |
"""

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.distillation import teacher as teacher_module
from gpt2lab.distillation.teacher import OnlineTeacher
from gpt2lab.errors import InputError
from gpt2lab.losses import chunk_losses, divergences
from gpt2lab.losses import lm_head_loss as head_loss_module
from gpt2lab.losses.divergences import Distribution
from gpt2lab.losses.lm_head_loss import LMHeadLoss
from gpt2lab.model.backbone import load_backbone
from gpt2lab.settings import LossSettings, ModelShape
from lightning_modules.distill import Distill
from lightning_modules.language_model import LanguageModel
from tests.conftest import Distil, Train, in_words
from tests.gpt2lab.losses import test_lm_head_loss
from tests.gpt2lab.losses.test_lm_head_loss import KL, MIXES
from tests.lightning_modules import test_training_modules
from tests.lightning_modules.test_training_modules import CountingData, fit, settings, teacher_folder, tokenizer_folder  # noqa: F401

LOSSES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "taid", "mse")


def begin(tokenizer: str, teacher: str, loss: LossSettings = KL, **changed: object) -> Distill:
    """Run preflight and one step."""
    module = Distill(settings(tokenizer, steps=1, **changed), teacher, loss)
    fit(module, CountingData())
    return module


def as_other_chunks(monkeypatch: pytest.MonkeyPatch, plant) -> None:
    """Replace the function of a chunk by `plant` applied to it."""
    honest = chunk_losses.chunk_function
    monkeypatch.setattr(head_loss_module, "chunk_function", lambda *given: plant(honest, *given))


def student_missing(monkeypatch) -> None:
    def entropy_only(teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
        return (teacher.value * teacher.log).sum(1), torch.zeros_like(student.value)

    monkeypatch.setattr(divergences, "forward_kl", entropy_only)


def padding_unmasked(monkeypatch) -> None:
    def plant(honest, *given):
        work = honest(*given)
        return lambda logits, labels, kept, *rest: work(logits, labels.clamp_min(0), torch.ones_like(kept), *rest)

    as_other_chunks(monkeypatch, plant)


def wrong_gradient(monkeypatch) -> None:
    honest = divergences.forward_kl
    monkeypatch.setattr(divergences, "forward_kl", lambda p, q: (honest(p, q)[0], divergences.reverse_kl(p, q)[1]))


def ids_clamped(monkeypatch) -> None:
    honest = OnlineTeacher.signal
    monkeypatch.setattr(OnlineTeacher, "signal", lambda self, ids, spans: honest(self, ids.clamp_max(9), spans))


def shifted_by_one(monkeypatch) -> None:
    honest = OnlineTeacher.signal

    def shifted(self: OnlineTeacher, ids: Tensor, spans: Tensor | None):
        result = honest(self, ids, spans)
        return replace(result, hidden=result.hidden.roll(1, 0))

    monkeypatch.setattr(OnlineTeacher, "signal", shifted)


def training_mode(monkeypatch) -> None:
    monkeypatch.setattr(teacher_module, "load_backbone", lambda source, dtype: load_backbone(source, 0.1, dtype))
    monkeypatch.setattr(torch.nn.Module, "eval", torch.nn.Module.train)


def dropout_in_teacher(monkeypatch) -> None:
    honest = OnlineTeacher.signal

    def dropping(self: OnlineTeacher, ids: Tensor, spans: Tensor | None):
        result = honest(self, ids, spans)
        return replace(result, hidden=torch.dropout(result.hidden, 0.1, train=True))

    monkeypatch.setattr(OnlineTeacher, "signal", dropping)


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (student_missing, "no gradient"),
        (padding_unmasked, "without a target"),
        (wrong_gradient, "but its gradient has the norm"),
        (ids_clamped, "not below the student's"),
        (shifted_by_one, "not below the student's"),
        (training_mode, "differently each time"),
        (dropout_in_teacher, "differently each time"),
    ],
)
def test_preflight_detects_the_bug(tokenizer_folder, teacher_folder, monkeypatch, plant, words) -> None:  # noqa: F811
    plant(monkeypatch)
    with pytest.raises(InputError, match=words):
        begin(tokenizer_folder, teacher_folder)


# Bugs that only a test can detect


def no_t2(monkeypatch) -> None:
    def plant(honest, kind, loss, *rest):
        return honest(kind, replace(loss, scale_t2=False) if loss else None, *rest)

    as_other_chunks(monkeypatch, plant)


def labels_of_the_first_chunk(monkeypatch) -> None:
    seen: list[Tensor] = []

    def plant(honest, *given):
        work = honest(*given)

        def wrong(logits, labels, *rest):
            seen.append(labels.clamp_min(0))
            return work(logits, seen[0] if len(seen[0]) == len(labels) else labels, *rest)

        return wrong

    as_other_chunks(monkeypatch, plant)


def zero_logits(monkeypatch) -> None:
    honest = test_lm_head_loss.lm_head_loss

    def padding(hidden, weight, labels, *, teacher=None, vocab_size=None, **given):
        if teacher is not None and len(teacher.weight) < len(weight):
            missing = torch.zeros(len(weight) - len(teacher.weight), teacher.weight.shape[1])
            teacher = replace(teacher, weight=torch.cat([teacher.weight, missing.to(teacher.weight)]))
        return honest(hidden, weight, labels, teacher=teacher, vocab_size=vocab_size, **given)

    monkeypatch.setattr(test_lm_head_loss, "lm_head_loss", padding)


def mean_of_micro_batches(monkeypatch) -> None:
    honest = LanguageModel.lm_head_loss

    def mean(self: LanguageModel, batch: Batch, *given) -> LMHeadLoss:
        result = honest(self, batch, *given)
        return replace(result, total=result.total / result.tokens * batch.target_tokens)

    monkeypatch.setattr(LanguageModel, "lm_head_loss", mean)


def teacher_trained(monkeypatch) -> None:
    honest = Distill.configure_optimizers

    def with_teacher(self: Distill):
        made = honest(self)
        made["optimizer"].add_param_group({"params": list(self.teacher.backbone.parameters())})
        return {"optimizer": made["optimizer"]}

    monkeypatch.setattr(Distill, "configure_optimizers", with_teacher)


def twin(tokenizer: str, teacher: str) -> None:
    test_lm_head_loss.test_value_and_gradients_equal_the_dense_twin("some", 7, KL, torch.float64, 1e-12)


def padding(tokenizer: str, teacher: str) -> None:
    test_lm_head_loss.test_padding_of_either_vocabulary_is_in_no_softmax(MIXES[0])


def accumulation(tokenizer: str, teacher: str) -> None:
    test_training_modules.test_accumulation_changes_nothing_but_rounding(tokenizer, "pretrain")


def left_alone(tokenizer: str, teacher: str) -> None:
    test_the_teacher_is_neither_trained_nor_saved(tokenizer, teacher)


@pytest.mark.parametrize(
    ("plant", "named_test"),
    [
        (no_t2, twin),
        (labels_of_the_first_chunk, twin),
        (zero_logits, padding),
        (mean_of_micro_batches, accumulation),
        (teacher_trained, left_alone),
    ],
)
def test_named_test_detects_the_bug(tokenizer_folder, teacher_folder, monkeypatch, plant, named_test) -> None:  # noqa: F811
    named_test(tokenizer_folder, teacher_folder)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        named_test(tokenizer_folder, teacher_folder)


def test_the_teacher_is_neither_trained_nor_saved(tokenizer_folder, teacher_folder) -> None:  # noqa: F811
    module = begin(tokenizer_folder, teacher_folder)
    trained = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    assert not trained & {id(p) for p in module.teacher.backbone.parameters()}
    assert not any("teacher" in name for name in module.state_dict())


# No error without a bug

GOOD = [LossSettings(name, hard_weight=0.2) for name in LOSSES]
GOOD += [LossSettings(name, temperature=2.0, hard_weight=0.0) for name in LOSSES]
GOOD += [LossSettings("forward_kl", temperature=4.0, scale_t2=False), LossSettings("jsd", beta=0.1)]
GOOD += [LossSettings("forward_kl", hidden_cosine=1.0), LossSettings("skew_kl", hidden_mse=1.0, alpha=0.5)]


@pytest.mark.parametrize("loss", GOOD, ids=in_words)
def test_good_configuration_passes_preflight(tokenizer_folder, teacher_folder, caplog, loss) -> None:  # noqa: F811
    with caplog.at_level(logging.WARNING):
        shape = ModelShape(1, 2, 24, 32, 64) if loss.hidden_cosine else None
        begin(tokenizer_folder, teacher_folder, loss, **({"shape": shape} if shape else {}))
    assert not [record.message for record in caplog.records if "preflight" in record.message]


def test_rank_without_validation_samples_passes_preflight(tokenizer_folder, teacher_folder) -> None:  # noqa: F811
    module = begin(tokenizer_folder, teacher_folder)
    batch = next(iter(module.trainer.datamodule.val_dataloader()))
    labels = torch.full_like(batch.labels[:1], IGNORE_INDEX)
    filler = Batch(batch.input_ids[:1], labels, 0, torch.empty(0, dtype=torch.int64))
    assert not module.preflight_checks().gradient(filler, module.teacher_signal(filler, "val"))


# Errors before preflight


def test_teacher_with_fewer_positions_than_context_is_refused(
    distil: Distil, train_here: Train, tiny: list[str]
) -> None:
    keys = [*tiny, "task=distill", "teacher=teacher", "model.n_positions=128", "context=128", "run_dir=longer"]
    answer = train_here(*keys)
    assert answer.code == 2
    assert "context=128 is longer than the 64 positions of the teacher" in answer.stderr
