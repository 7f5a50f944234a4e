"""The three modules under a real Trainer: accumulation, resume, averaging, LoRA, distillation and its preflight."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.errors import InputError
from gpt2lab.generation.completion import distinct_seed
from gpt2lab.model.backbone import Backbone, to_hf
from gpt2lab.settings import (
    GREEDY,
    TOP_K,
    LoraSettings,
    LossSettings,
    ModelShape,
    OptimizerSettings,
    ScheduleSettings,
    TeacherCacheSettings,
    TextMetricSettings,
    TrainingSettings,
)
from lightning_modules.distill import Distill
from lightning_modules.finetune import FineTune
from lightning_modules.language_model import LanguageModel
from lightning_modules.nan_guard import NonFiniteLossError
from lightning_modules.plugins.bf16_weights import Bf16Weights
from lightning_modules.pretrain import Pretrain

WORDS = ["<|endoftext|>", *(f"w{number}" for number in range(63))]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=WORDS[0], bos_token=WORDS[0], pad_token=WORDS[0]
    ).save_pretrained(folder)
    return str(folder)


class CountingData(lightning.LightningDataModule):
    """Sequences that count upwards, learnt quickly, a pure function of the step. Pairs have a prompt of six tokens."""

    def __init__(self, accumulate: int = 1, pairs: bool = False) -> None:
        super().__init__()
        self.accumulate = accumulate
        self.pairs = pairs

    def batch(self, step: int, rows: slice) -> Batch:
        start = torch.randint(1, 64, (8, 1), generator=torch.Generator().manual_seed(step))
        tokens = (start + torch.arange(17)) % 63 + 1
        ids, labels = tokens[:, :-1], tokens[:, 1:].clone()
        if self.pairs:
            labels[:, :5] = IGNORE_INDEX
        else:
            labels[0, 3] = IGNORE_INDEX
        count = int((labels != IGNORE_INDEX).sum())
        prompts = torch.full((8,), 6) if self.pairs else None
        references = [" ".join(WORDS[i] for i in row[6:10].tolist()) for row in tokens] if self.pairs else None
        return Batch(
            ids[rows],
            labels[rows],
            count,
            torch.arange(8)[rows],
            prompts[rows] if prompts is not None else None,
            references[rows] if references else None,
        )

    def val_groups(self, count: int) -> list[int]:
        return list(range(count))

    def train_dataloader(self) -> "CountingStream":
        return CountingStream(self, self.trainer.global_step)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([self.batch(10_000 + index, slice(0, 8)) for index in range(3)], batch_size=None)


class CountingStream:
    def __init__(self, data: CountingData, first_step: int) -> None:
        self.data = data
        self.first_step = first_step

    def __iter__(self) -> Iterator[Batch]:
        size = 8 // self.data.accumulate
        for step in itertools.count(self.first_step):
            for part in range(self.data.accumulate):
                yield self.data.batch(step, slice(part * size, (part + 1) * size))


def settings(tokenizer_folder: str, steps: int = 6, **changes: object) -> TrainingSettings:
    defaults: dict = {
        "shape": ModelShape(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=64),
        "tokenizer_folder": tokenizer_folder,
        "init": "scratch",
        "optimizer": OptimizerSettings("muon", lr=1e-2, weight_decay=0.1),
        "schedule": ScheduleSettings("wsd", warmup_steps=2, final_fraction=0.1),
        "steps": steps,
        "seed": 1,
        "val_tokens": 3 * 127,
        "val_bytes": 1000,
    }
    return TrainingSettings(**{**defaults, **changes})


def fit(
    module: LanguageModel,
    data: CountingData,
    resume: Path | None = None,
    callbacks: list[Callback] | None = None,
    precision: Any = "32-true",
) -> lightning.Trainer:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=module.settings.steps,
        accumulate_grad_batches=data.accumulate,
        val_check_interval=module.settings.steps * data.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        precision=None if precision == "bf16-true" else precision,
        plugins=[Bf16Weights()] if precision == "bf16-true" else None,
    )
    trainer.fit(module, data, ckpt_path=resume)
    return trainer


def flat_weights(module: LanguageModel) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.backbone.parameters()])


@pytest.mark.parametrize("loss", [LossSettings("reverse_kl"), LossSettings("jsd", beta=1.0)])
def test_reverse_kl_takes_no_cache_without_its_tail(tokenizer_folder, loss) -> None:
    cached = TeacherCacheSettings("topk", tail=False)
    with pytest.raises(InputError, match="tail=true"):
        Distill(settings(tokenizer_folder), "teacher", loss, cached=cached)
    Distill(settings(tokenizer_folder), "teacher", LossSettings("jsd"), cached=cached)


def test_training_learns_to_count(tokenizer_folder) -> None:
    module = Pretrain(settings(tokenizer_folder, steps=60))
    trainer = fit(module, CountingData())
    assert trainer.callback_metrics["val/loss"] < 0.5
    assert module.tokens_seen == 60 * 127
    assert module.generate(["w5 w6 w7 w8"], GREEDY, max_new_tokens=3) == ["w9 w10 w11"]


def test_sampled_text_depends_on_the_place_of_its_prompt(tokenizer_folder) -> None:
    """Not on the prompts generated with it, as ranks generate shares of them."""
    module = Pretrain(settings(tokenizer_folder))
    module.configure_model()
    prompts = [f"w{number} w5" for number in range(5)]
    whole = module.generate(prompts, TOP_K, max_new_tokens=8)
    ids = [module.tokenizer(prompt)["input_ids"] for prompt in prompts]
    seeds = [distinct_seed(module.settings.seed, place) for place in range(5)]
    for rank in range(2):
        assert module.generate_from_ids(ids[rank::2], TOP_K, 8, seeds[rank::2]) == whole[rank::2]
    assert len(set(module.generate(prompts[:1] * 5, TOP_K, max_new_tokens=8))) > 1, "each prompt has its own draws"


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_accumulation_changes_nothing_but_rounding(tokenizer_folder, task) -> None:
    ends = []
    for accumulate in (1, 4):
        training = settings(tokenizer_folder, optimizer=OptimizerSettings("adamw", 1e-3, 0.1))
        module = (
            Pretrain(training)
            if task == "pretrain"
            else FineTune(training, LoraSettings(), TextMetricSettings([], 0, 4))
        )
        trainer = fit(module, CountingData(accumulate, pairs=task == "finetune"))
        ends.append((flat_weights(module), trainer.callback_metrics["train/loss"].item()))
    (one, one_loss), (four, four_loss) = ends
    assert (one - four).norm() <= 1e-5 * one.norm()
    assert one_loss == pytest.approx(four_loss, rel=1e-5)


class SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_resumed_run_ends_with_the_same_weights(tokenizer_folder, tmp_path, ema, precision) -> None:
    shape = ModelShape(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=64, dropout=0.2)
    unbroken = Pretrain(settings(tokenizer_folder, shape=shape, ema=ema))
    fit(unbroken, CountingData(2), callbacks=[SaveAt(3, tmp_path / "half.ckpt")], precision=precision)
    torch.manual_seed(12345)
    resumed = Pretrain(settings(tokenizer_folder, shape=shape, ema=ema))
    fit(resumed, CountingData(2), resume=tmp_path / "half.ckpt", precision=precision)
    assert flat_weights(unbroken).dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert torch.equal(flat_weights(unbroken), flat_weights(resumed))
    assert unbroken.tokens_seen == resumed.tokens_seen
    for name, weight in unbroken.export_model().state_dict().items():
        assert torch.equal(weight, resumed.export_model().state_dict()[name]), name


def test_averaged_weights_are_exported(tokenizer_folder) -> None:
    module = Pretrain(settings(tokenizer_folder, ema=0.5))
    fit(module, CountingData())
    exported = module.export_model().transformer.wte.weight
    averaged = module.average.averages[0]
    assert torch.equal(exported, averaged)
    assert not torch.equal(exported, module.backbone.lm.transformer.wte.weight)


def test_non_finite_loss_stops_the_run_and_names_step_and_batch(tokenizer_folder) -> None:
    module = Pretrain(settings(tokenizer_folder, optimizer=OptimizerSettings("adam", 1e30, 0.0), steps=20))
    with pytest.raises(NonFiniteLossError, match=r"at step \d+, batch of sequences \[0, 1, 2"):
        fit(module, CountingData())


def test_bf16_weights_start_as_fp32_and_change_no_other_dtype(tokenizer_folder) -> None:
    """Lightning's bf16-true makes bf16 PyTorch's default dtype, which rounds counts and changes the initial weights."""

    class Types(Callback):
        def __init__(self) -> None:
            self.start = torch.empty(0)
            self.seen: set[tuple[str, torch.dtype]] = set()

        def on_train_start(self, trainer, module) -> None:
            self.start = flat_weights(module)

            def look(layer, given, hidden: torch.Tensor) -> None:
                self.seen |= {("default", torch.get_default_dtype()), ("hidden", hidden.dtype)}

            module.backbone.lm.transformer.ln_f.register_forward_hook(look)

        def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
            self.seen |= {("gradient", parameter.grad.dtype) for parameter in module.backbone.parameters()}

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            self.seen |= {("loss", outputs["loss"].dtype)}

    exact, rounded = Types(), Types()
    fit(Pretrain(settings(tokenizer_folder)), CountingData(), callbacks=[exact])
    module = Pretrain(settings(tokenizer_folder))
    fit(module, CountingData(), callbacks=[rounded], precision="bf16-true")
    assert torch.equal(rounded.start, exact.start.bfloat16())
    low = {("hidden", torch.bfloat16), ("gradient", torch.bfloat16)}
    assert rounded.seen == low | {("default", torch.float32), ("loss", torch.float32)}
    moments = module.trainer.optimizers[0].state.values()
    assert {tensor.dtype for state in moments for name, tensor in state.items() if name != "step"} == {torch.bfloat16}


def test_bf16_true_validation_loss_equals_float64(tokenizer_folder) -> None:
    """The reference is PyTorch's cross-entropy of the same logits in float64."""
    module, data = Pretrain(settings(tokenizer_folder)), CountingData()
    loss = fit(module, data, precision="bf16-true").callback_metrics["val/loss"].item()
    batches = list(data.val_dataloader())
    with torch.no_grad():
        logits = torch.cat([module.backbone.logits(batch.input_ids).flatten(0, 1) for batch in batches])
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, ignore_index=IGNORE_INDEX).item()
    assert loss == pytest.approx(expected, rel=1e-5)


# Fine-tuning


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_lora_trains_adapters_only_and_exports_merged_and_apart(tokenizer_folder, tmp_path, ema) -> None:
    base = to_hf(Backbone(settings(tokenizer_folder).shape))
    base.save_pretrained(tmp_path / "base")
    training = settings(
        tokenizer_folder,
        steps=20,
        init=str(tmp_path / "base"),
        optimizer=OptimizerSettings("adamw", 1e-2, 0.0),
        ema=ema,
    )
    module = FineTune(training, LoraSettings(rank=4, alpha=8.0, dropout=0.1), TextMetricSettings(["exact"], 4, 4))
    trainer = fit(module, CountingData(pairs=True))
    assert "val/exact" in trainer.callback_metrics
    merged = module.export_model()
    assert torch.equal(merged.transformer.wte.weight, base.transformer.wte.weight)
    assert not torch.equal(merged.transformer.h[0].mlp.c_fc.weight, base.transformer.h[0].mlp.c_fc.weight)

    assert module.export_adapter(tmp_path / "adapter")
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    plain = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    ids = torch.arange(20)[None]
    assert (adapted(ids).logits - merged(ids).logits).abs().max() <= 1e-5
    with module.averaged_weights():
        assert (module.eval().backbone.logits(ids) - merged(ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_layers_keep_their_weights_and_the_others_learn(tokenizer_folder, tmp_path, optimizer) -> None:
    base = to_hf(Backbone(settings(tokenizer_folder, shape=ModelShape(2, 2, 32, 32, 64)).shape))
    base.save_pretrained(tmp_path)
    training = settings(
        tokenizer_folder, steps=5, init=str(tmp_path), optimizer=OptimizerSettings(optimizer, 1e-2, 0.1), ema=0.9
    )
    module = FineTune(training, LoraSettings(), TextMetricSettings([], 0, 4), frozen_layers=1)
    fit(module, CountingData(pairs=True))
    before, after = base.state_dict(), module.export_model().state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if ".h.1." not in name} == {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert {name for name in before if ".h.1." in name and "attn.c_attn.weight" in name} <= changed


def test_finetuning_scores_generated_text(tokenizer_folder) -> None:
    exact = {}
    for steps in (1, 80):
        text = TextMetricSettings(["exact", "placeholders"], 8, 4)
        module = FineTune(settings(tokenizer_folder, steps=steps), LoraSettings(), text)
        metrics = fit(module, CountingData(pairs=True)).callback_metrics
        exact[steps] = metrics["val/exact"]
        assert "val/placeholders" not in metrics  # no text has any
        assert module.watched_metric == "val/exact"
    assert exact[1] < 10
    assert exact[80] > 90


# Distillation


@pytest.fixture(scope="module")
def teacher_folder(tokenizer_folder, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    module = Pretrain(settings(tokenizer_folder, steps=60, shape=ModelShape(2, 2, 64, 32, 64)))
    fit(module, CountingData())
    module.export_model().save_pretrained(folder)
    module.tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_student_approaches_its_teacher(tokenizer_folder, teacher_folder) -> None:
    module = Distill(settings(tokenizer_folder, steps=60), teacher_folder, LossSettings("forward_kl", 2.0, True, 0.1))
    trainer = fit(module, CountingData())
    assert trainer.callback_metrics["distill/kl"] < 0.3
    assert module.facts_for_report()["teacher"]["val_loss"] < 0.5
    assert not any("teacher" in name for name in module.state_dict())
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not trained & {id(p) for p in module.teacher.backbone.parameters()}


def test_preflight_refuses_a_teacher_no_better_than_its_student(tokenizer_folder, teacher_folder, tmp_path) -> None:
    to_hf(Backbone(ModelShape(1, 1, 16, 32, 64))).save_pretrained(tmp_path)
    module = Distill(settings(tokenizer_folder), str(tmp_path), LossSettings("forward_kl"))
    with pytest.raises(InputError, match="holds no tokenizer"):
        fit(module, CountingData())
    module.tokenizer.save_pretrained(tmp_path)
    good_student = settings(tokenizer_folder, init=teacher_folder)
    with pytest.raises(InputError, match="not below the student's"):
        fit(Distill(good_student, str(tmp_path), LossSettings("forward_kl")), CountingData())
    fit(Distill(good_student, str(tmp_path), LossSettings("forward_kl"), preflight="warn"), CountingData())


def test_a_teacher_of_another_vocabulary_is_refused(tokenizer_folder, tmp_path) -> None:
    to_hf(Backbone(ModelShape(1, 1, 16, 32, 60))).save_pretrained(tmp_path)
    module = Distill(settings(tokenizer_folder), str(tmp_path), LossSettings("forward_kl"), preflight="off")
    with pytest.raises(InputError, match="a vocabulary size of 60, the tokenizer of this run 64"):
        fit(module, CountingData())
