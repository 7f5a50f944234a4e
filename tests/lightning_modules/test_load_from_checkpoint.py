"""Lightning's own API: `load_from_checkpoint`, a user's Trainer, and a resumable training loader."""

import warnings
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from transformers import GPT2LMHeadModel

from datamodules.language_modeling import LanguageModelingData
from gpt2lab.plain_values import is_plain
from gpt2lab.settings import (
    LossSettings,
    ModelShape,
    OptimizerSettings,
    ScheduleSettings,
    TokenizerChoice,
    TrainingSettings,
)
from gpt2lab.storage.model_folder import read_pair_template
from lightning_modules.distill import Distill
from lightning_modules.finetune import FineTune
from lightning_modules.language_model import LanguageModel
from lightning_modules.pretrain import Pretrain
from tests.conftest import Distil, Train

IDS = torch.arange(40)[None] * 7 % 300  # (1, T)


def logits_of(module: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return module.eval().backbone.logits(IDS)


def exported(run: Path) -> torch.Tensor:
    with torch.no_grad():
        return GPT2LMHeadModel.from_pretrained(run / "hf").eval()(IDS).logits


RUNS: dict[str, tuple[type[LanguageModel], list[str]]] = {
    "pretrain": (Pretrain, []),
    "distill": (Distill, ["task=distill", "teacher=teacher", "loss=jsd", "loss.hidden_mse=0.1"]),
    "finetune": (
        FineTune,
        ["task=finetune", "init=teacher", "task.lora.rank=2", "task.text.max_new_tokens=8", "data=pairs"],
    ),
}


@pytest.fixture
def teacher(distil: Distil, tmp_path: Path) -> Path:
    """A pretrained run in ./teacher."""
    return tmp_path / "teacher"


def arguments(task: str, tiny: list[str], tmp_path: Path) -> list[str]:
    if task != "finetune":
        return tiny
    rows = [f'{{"source": "add {n} and {n + 1}", "target": "{2 * n + 1}"}}' for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    kept = [key for key in tiny if not key.startswith(("model.", "vocab_size", "path", "data=", "batch_tokens"))]
    return [*kept, f"path={tmp_path / 'pairs.jsonl'}", "batch_sequences=8", "model=auto"]


@pytest.mark.parametrize("task", RUNS)
def test_load_from_checkpoint_gives_equal_logits(task, train_here: Train, tiny, tmp_path, teacher):
    kind, keys = RUNS[task]
    ended = train_here(*arguments(task, tiny, tmp_path), *keys, "steps=4", "run_dir=run")
    assert ended.code == 0, ended.stderr
    file = tmp_path / "run" / "checkpoints" / "step-000004.ckpt"
    stored = torch.load(file, weights_only=True)["hyper_parameters"]
    assert is_plain(stored)
    assert stored["training"]["steps"] == 4
    module = kind.load_from_checkpoint(file)
    assert isinstance(module, kind)
    # LoRA: the export has the adapters merged into the weights.
    assert (logits_of(module) - exported(tmp_path / "run")).abs().max() <= 1e-5
    again = kind.load_from_checkpoint(file, map_location="cpu", strict=True)
    assert torch.equal(logits_of(module), logits_of(again))
    texts = [one.generate(["def ", "add 1"], one.sampling_methods[0], 4) for one in (module, again)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 2
    template = {"prompt": "{source}\n\n", "response": "{target}"} if task == "finetune" else {}
    assert read_pair_template(tmp_path / "run" / "hf") == stored["training"]["pair_template"] == template
    if isinstance(module, Distill):
        assert stored["teacher"] == str((teacher / "hf").resolve())
        assert module.teacher.signal(IDS).rows == IDS.numel()


def test_averaged_weights_are_loaded_from_a_checkpoint(train_here: Train, tiny, tmp_path):
    assert train_here(*tiny, "steps=4", "ema=0.5", "run_dir=run").code == 0
    module = Pretrain.load_from_checkpoint(tmp_path / "run" / "checkpoints" / "step-000004.ckpt")
    with torch.no_grad():
        averaged = module.export_model()(IDS).logits
    assert torch.equal(averaged, exported(tmp_path / "run"))


# A user's own Trainer


def data(path: Path, cache: Path, accumulate: int = 1) -> LanguageModelingData:
    return LanguageModelingData(
        name="text",
        source="text",
        path=str(path),
        tokenizer=TokenizerChoice("bpe", vocab_size=300),
        context=32,
        batch_sequences=8,
        accumulate=accumulate,
        seed=1,
        val_fraction=0.3,
        cache_dir=str(cache),
    )


def training(prepared: LanguageModelingData, steps: int) -> TrainingSettings:
    facts = prepared.prepare()
    return TrainingSettings(
        shape=ModelShape(2, 2, 32, n_positions=64, vocab_size=facts.vocab_size, dropout=0.1),
        tokenizer_folder=facts.tokenizer_folder,
        init="scratch",
        optimizer=OptimizerSettings("adamw", lr=1e-2, weight_decay=0.1),
        schedule=ScheduleSettings("constant", warmup_steps=2, final_fraction=1.0),
        steps=steps,
        seed=1,
        val_tokens=facts.val_tokens,
        val_bytes=facts.val_bytes,
        log_every=1,
    )


def own_trainer(folder: Path, steps: int) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        limit_val_batches=2,
        callbacks=[
            ModelCheckpoint(folder, monitor="val/loss", filename="best-{step}", save_last=True),
            EarlyStopping("val/loss", patience=3),
        ],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_distill_runs_under_a_trainer_of_the_user(sources, cache, tmp_path, teacher):
    prepared = data(sources, cache)
    module = Distill(training(prepared, 8), teacher=str(teacher), loss=LossSettings("forward_kl"))
    trainer = own_trainer(tmp_path, 8)
    trainer.fit(module, prepared)
    assert trainer.global_step == 8
    assert trainer.callback_metrics["val/loss"] > 0
    assert trainer.callback_metrics["distill/kl"] > 0
    loaded = Distill.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(logits_of(loaded), logits_of(module))
    assert trainer.validate(loaded, prepared, verbose=False) is not None


def test_a_resumed_own_trainer_ends_with_the_same_weights(sources, cache, tmp_path):
    prepared = data(sources, cache)
    unbroken = Pretrain(training(prepared, 8))
    own_trainer(tmp_path / "whole", 8).fit(unbroken, prepared)
    own_trainer(tmp_path / "half", 5).fit(Pretrain(training(prepared, 8)), prepared)
    resumed = Pretrain(training(prepared, 8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        own_trainer(tmp_path / "half", 8).fit(resumed, prepared, ckpt_path=tmp_path / "half" / "last.ckpt")
    assert resumed.trainer.global_step == 8
    assert torch.equal(logits_of(unbroken), logits_of(resumed))
    assert not [str(one.message) for one in caught if "resumable" in str(one.message)]


def test_resume_does_not_warn_of_the_loader(train_here: Train, tiny, tmp_path):
    assert train_here(*tiny, "steps=3", "run_dir=run").code == 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ended = train_here("resume=run", "steps=5")
    assert ended.code == 0, ended.stderr
    assert "resumable" not in ended.stderr + "".join(str(one.message) for one in caught)
    states = torch.load(tmp_path / "run" / "checkpoints" / "step-000005.ckpt", weights_only=True)["loops"]
    assert states["fit_loop"]["state_dict"]["combined_loader"] == [{"step": 5}]


def test_loader_continues_from_its_saved_state(sources, cache):
    prepared = data(sources, cache, accumulate=2)
    prepared.prepare()
    loader, other = prepared.train_dataloader(), prepared.train_dataloader()
    batches = iter(loader)
    for _ in range(6):  # three steps of two micro-batches
        next(batches)
    assert loader.state_dict() == {"step": 0}  # of the trainer, and none is attached yet
    other.load_state_dict({"step": 3})
    assert torch.equal(next(iter(other)).input_ids, next(batches).input_ids)
