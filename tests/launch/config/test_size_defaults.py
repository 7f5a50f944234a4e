"""Defaults by size: context, batch, steps, learning rate, weight decay and warm-up of keys that are auto."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from gpt2lab.errors import InputError
from launch.checks import checks
from launch.config import schema, size_defaults
from launch.config.schema import ModelKeys, RunConfig, value_of
from tests.conftest import Train
from tests.support.configurations import composed

NANO = {"context": 256, "batch_tokens": 4096, "steps": 300, "optimizer.weight_decay": 0.1, size_defaults.WARMUP: None}


def values(config: RunConfig) -> dict[str, Any]:
    return {key: value_of(config, key) for key in size_defaults.RULES}


@pytest.mark.parametrize("model", ["nano", "micro"])
@pytest.mark.parametrize(
    ("keys", "changed"),
    [
        ((), {"optimizer.lr": 1e-2}),
        (("task=distill",), {"optimizer.lr": 1e-2}),
        (("task=finetune",), {"optimizer.lr": 3e-3}),
        (("init=x",), {"optimizer.lr": 3e-3}),
        (("optimizer=adamw",), {"optimizer.lr": 1e-3}),
        (("optimizer=adam",), {"optimizer.lr": 1e-3, "optimizer.weight_decay": 0.0}),
    ],
)
def test_nano_keeps_its_values(keys: tuple[str, ...], changed: dict[str, Any], model: str):
    config = composed(*keys, f"model={model}", "accelerator=gpu")
    assert values(config) == {**NANO, **changed}


ON_GPU = [  # model, context, batch_tokens, lr, weight decay
    ("mini", 256, 16_384, 6e-3),
    ("distil", 1024, 524_288, 6e-4),
    ("small", 1024, 524_288, 6e-4),
    ("medium", 1024, 524_288, 3e-4),
    ("large", 1024, 524_288, 2.5e-4),
    ("xl", 1024, 1_048_576, 2e-4),
]
PARAMETERS = {"distil": 81.9e6, "small": 124.4e6, "medium": 354.8e6, "large": 774e6, "xl": 1557.6e6}


@pytest.mark.parametrize(("model", "context", "batch", "rate"), ON_GPU)
def test_sizes_have_the_values_of_practice(model: str, context: int, batch: int, rate: float):
    found = composed("task=distill", f"model={model}", "accelerator=gpu")
    assert (found.context, found.batch_tokens) == (context, batch)
    assert (found.optimizer.lr, found.optimizer.weight_decay) == (rate, 0.1)
    if model in PARAMETERS:
        assert found.steps * batch / PARAMETERS[model] == pytest.approx(20, rel=0.02)
        assert found.schedule.warmup_steps == min(round(0.02 * found.steps), 700)
    on_cpu = composed(f"model={model}", "accelerator=cpu")
    assert (on_cpu.context, on_cpu.batch_tokens, on_cpu.steps) == (context, 4096, 300)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        (("model=small", "batch_tokens=131072"), {"steps": 18_997, "batch_tokens": 131_072}),
        (("model=small", "context=300"), {"batch_tokens": 524_100}),
        (("context=300",), {"batch_tokens": 3900}),
        (("model=small", "steps=20"), {"steps": 20, size_defaults.WARMUP: None}),
        (("model=small", "optimizer.lr=1", "optimizer.weight_decay=0"), {"optimizer.lr": 1.0}),
        (("model=small", "model.n_positions=512"), {"context": 512}),
        (("model=small", "model.n_layer=2", "model.n_head=2", "model.n_embd=128"), {**NANO, "optimizer.lr": 1e-2}),
        (("model=nano", "model.n_layer=12", "model.n_head=12", "model.n_embd=768"), {"optimizer.lr": 6e-4}),
        (("experiment=gpt2_124m_fineweb",), {"steps": 19_560, "optimizer.lr": 6e-4, size_defaults.WARMUP: 700}),
        (("experiment=gpt2_124m_fineweb", "steps=auto"), {"steps": 4749, "batch_tokens": 524_288}),
        (("model=small", "schedule.warmup_steps=7"), {size_defaults.WARMUP: 7}),
        (("task=finetune", "model=small"), {"optimizer.lr": 1e-4, "optimizer.weight_decay": 0.01, "steps": 1000}),
        (("task=finetune", "model=xl", "task.lora.rank=8"), {"optimizer.lr": 2e-4}),
        (("task=distill", "model=small", "init=teacher_layers"), {"optimizer.lr": 6e-4}),
        (("task=pretrain", "model=medium", "init=x"), {"optimizer.lr": 5e-5}),
    ],
)
def test_given_values_decide_the_others(keys: tuple[str, ...], wanted: dict[str, Any]):
    found = values(composed(*keys, "accelerator=gpu"))
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)


@pytest.fixture
def with_positions(train_here: Train, tiny: list[str]) -> Callable[[int], list[str]]:
    """Train a model with so many positions; return the arguments of a run that takes its sizes."""

    def train(positions: int) -> list[str]:
        keys = (f"model.n_positions={positions}", "steps=1", "run_dir=init")
        assert train_here(*tiny, *keys).code == 0
        sized = ("context", "batch_tokens", "model", "vocab_size")
        return [
            *(key for key in tiny if not key.startswith(sized)),
            "model=auto",
            "init=init",
            "accelerator=cpu",
            "plan=true",
        ]

    return train


@pytest.mark.parametrize("task", [(), ("task=distill", "teacher=init")])
def test_context_follows_an_init_with_few_positions(
    task: tuple[str, ...], train_here: Train, with_positions: Callable[[int], list[str]]
):
    answer = train_here(*with_positions(40), *task)
    assert answer.code == 0, answer.stderr
    assert re.search(r"context\W+40\b", answer.stdout + answer.stderr)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (("sequences=gkd", "sequences.max_new_tokens=300"), ""),
        (("sequences=gkd", "sequences.max_new_tokens=1024"), "leaves no tokens for a prompt in context=1024"),
        (("sequences=distillm", "sequences.capacity=600"), ""),
        (("sequences=distillm", "sequences.capacity=200"), "less than the 512 sequences of a step"),
    ],
)
def test_generated_text_is_checked_with_the_sizes_of_init(keys: tuple[str, ...], problem: str):
    """Before, the context is 256 and a step has 16 sequences."""
    config = composed("task=distill", "model=auto", "init=x", "teacher=y", "accelerator=gpu", *keys)
    checks.distillation.check(config)
    small = ModelKeys(n_layer=12, n_head=12, n_embd=768, n_positions=1024, dropout=0.0)
    sized = schema.with_size_defaults(config, small, True)
    with pytest.raises(InputError, match=problem) if problem else nullcontext():
        checks.check_sizes(sized, small)


def test_sizes_of_init_decide_once_they_are_known():
    config = composed("task=finetune")
    sized = schema.with_size_defaults(config, ModelKeys(24, 16, 1024, 1024, 0.0), on_gpu=True)
    assert (sized.context, sized.optimizer.lr, sized.steps) == (1024, 5e-5, 1000)
    again = schema.with_size_defaults(sized, ModelKeys(2, 2, 128, 1024, 0.0), on_gpu=True)
    assert values(again) == {**NANO, "optimizer.lr": 3e-3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("steps=abc", "steps=abc is not a whole number"),
        ("steps=1.5", "steps=1.5 is not a whole number"),
        ("batch_tokens=true", "is not a whole number"),
        ("context=null", "context cannot be null"),
        ("optimizer.lr=fast", "optimizer.lr=fast is not a number"),
        ("optimizer.weight_decay=[1]", "is not a number"),
        ("steps=0", "steps=0 is out of range"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(given: str, message: str, train_here: Train):
    answer = train_here(given)
    assert (answer.code, message in answer.stderr) == (2, True), answer.stderr


def test_plan_shows_each_default_and_its_origin(train_here: Train):
    keys = ("model=small", "accelerator=gpu", "plan_memory=80", "data=fineweb_edu", "context=512", "plan=true")
    answer = train_here(*keys)
    assert answer.code == 0, answer.stderr
    rows = dict(re.findall(r"^([\w.]+) {2,}(\S+ {2,}\S.*)$", answer.stdout, flags=re.MULTILINE))
    assert rows["context"].split() == ["512", "given"]
    assert rows["batch_tokens"].startswith("524,288   small: ")
    assert rows["steps"].startswith("4,749 ")
    assert "Chinchilla" in answer.stdout
    for key in ("optimizer.lr", "optimizer.weight_decay", "schedule.warmup_steps", "compile"):
        assert key in rows
