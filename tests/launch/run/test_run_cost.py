"""The plan of a run counts all that it does: every command for GPUs on the pages trains for 90 % of its compute."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config

from gpt2lab.errors import InputError
from launch.config.run_spec import RunSpec
from launch.config.schema import ModelKeys
from launch.memory.memory_plan import memory_plan
from launch.memory.run_sizes import rank_memory_limit, run_sizes
from launch.run import disk_space, plan_report, run_cost
from tests.conftest import ROOT
from tests.support.configurations import composed, resolved
from tests.test_readme import PAGES, commands

# Published sizes of models that the commands name, (layers, heads, width)
PUBLISHED = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-xl": (48, 25, 1600)}
ALIASES = {"./teacher-gpt2-1.5B": "gpt2-xl", "MiniLLM/init-gpt2-120M": "gpt2", "runs/pretrain/medium": "gpt2-medium"}
VOCABULARY = 50_257
GPU_SECTION = (ROOT / "README.md").read_text().partition("## GPUs and clusters")[2].partition("\n## ")[0]
FOR_GPUS = re.compile(
    r"accelerator=gpu|plan_memory=|model=(?:distil|small|medium|large|xl)|experiment=(?!distill_study)"
)
NOT_PLANNED = re.compile(r"resume=|--|accelerator=cpu")
LEFT_OUT = re.compile(r"-m|plan=|plan_memory=|launcher|hparams_search|n_jobs=|accelerator=|name=")


def gpu_commands() -> list[str]:
    """Return the commands of README's section on GPUs, and those of all pages with a GPU, a recipe or a large model."""
    texts = [page.read_text() for page in PAGES if page.parent.name != "measurements"]  # which record what was run
    on_pages = [command for command in commands("train.py", texts) if FOR_GPUS.search(command)]
    found = sorted({*commands("train.py", [GPU_SECTION]), *on_pages})
    return [command for command in found if not NOT_PLANNED.search(command)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the configurations of published models."""
    folder = tmp_path_factory.mktemp("models")
    for name, (layers, heads, width) in PUBLISHED.items():
        (folder / name).mkdir()
        config = GPT2Config(n_layer=layers, n_head=heads, n_embd=width, vocab_size=VOCABULARY)
        (folder / name / "config.json").write_text(json.dumps(config.to_dict()))
    return {name: folder / ALIASES.get(name, name) for name in (*PUBLISHED, *ALIASES)}


def planned(command: str, models: dict[str, Path]) -> RunSpec:
    """Return the run of a command, for a sweep its first, on GPUs of 80 GB: as many as it names, else one."""
    words = [re.sub(r"interval\((.*),.*\)", r"\1", word) for word in shlex.split(command)]
    words = [word.split(",")[0] for word in words if not LEFT_OUT.match(word)]
    config = composed(*words, "plan=true", "plan_memory=80", "accelerator=gpu")
    if config.devices == "auto":
        config = replace(config, devices=8 if command in commands("train.py", [GPU_SECTION]) else 1)
    changes: dict[str, Any] = {}
    if config.task_name == "distill":
        changes["teacher"] = str(models[config.teacher])
    if config.init in models:
        changes["init"] = str(models[config.init])
        shape = GPT2Config.from_pretrained(models[config.init])
        changes["model"] = ModelKeys(shape.n_layer, shape.n_head, shape.n_embd, shape.n_positions, 0.0)
    return resolved(config, int(80e9), **changes)


@pytest.mark.parametrize("command", gpu_commands())
def test_gpu_commands_train_for_most_of_their_compute(command: str, models: dict[str, Path]) -> None:
    spec = planned(command, models)
    sizes = run_sizes(spec.config, spec.resolved, spec.machine, VOCABULARY)
    files = disk_space.run_files(spec, VOCABULARY)
    cost = run_cost.run_cost(spec, sizes, files, *run_cost.split_tokens(spec))
    assert cost.training_share >= 0.9
    limit = rank_memory_limit(spec.machine, int(80e9), 0)
    assert limit is not None
    assert memory_plan(sizes).peak <= limit


KEYS = ("accelerator=cpu", "steps=1000", "batch_tokens=256", "context=32", "validate_tokens=3200")


def cost_of(*words: str, split: int | None = None) -> tuple[run_cost.RunCost, RunSpec]:
    spec = resolved(composed(*KEYS, *words))
    sizes = run_sizes(spec.config, spec.resolved, spec.machine, 300)
    return run_cost.run_cost(spec, sizes, disk_space.run_files(spec, 300), split), spec


def test_the_time_of_a_plan_has_every_phase() -> None:
    """Ten validations, samplings and saves of 1,000 steps of 256 tokens, at 100 tokens a second."""
    cost, spec = cost_of("callbacks.final_score.tokens=32000")
    files, seconds = disk_space.run_files(spec, 300), cost.seconds(100.0, decoding=0.5)
    assert seconds["train"] == pytest.approx(2_560)
    validation, samples = (10 * 3200 + 32_000) / 3 / 100, 10 * 9 * (32 + 48) / 3 / 100
    assert seconds["validate"] == pytest.approx(validation)
    assert seconds["sample"] == pytest.approx(samples + 10 * 3 * 48 * 0.5)
    assert seconds["save"] == pytest.approx(files.checkpoint / run_cost.DISK_BYTES)  # the last; the others beside it
    assert seconds["export"] == pytest.approx(2 * files.export / run_cost.DISK_BYTES + run_cost.VERIFY_SECONDS)
    sharded, spec = cost_of("strategy=fsdp", "devices=2")
    waits = 10 * disk_space.run_files(spec, 300).checkpoint / run_cost.DISK_BYTES
    assert sharded.seconds(100.0, 0.0)["save"] == pytest.approx(waits)
    assert cost.training_share == pytest.approx(2_560 / (2_560 + validation + samples))


def test_a_small_split_limits_what_a_plan_validates() -> None:
    assert cost_of(split=320)[0].seconds(100.0, 0.0)["validate"] == pytest.approx(10 * 320 / 3 / 100)
    whole = cost_of("validate_tokens=full", split=6400)[0]
    assert whole.seconds(100.0, 0.0)["validate"] == pytest.approx(10 * 6400 / 3 / 100)
    with pytest.raises(InputError, match="known once the data are prepared"):
        cost_of("validate_tokens=full")


SHORT = ("model=nano", "accelerator=cpu", "steps=40", "batch_tokens=512", "context=256")


@pytest.mark.parametrize(
    ("words", "split", "warns"),
    [
        ((), 4_000_000, True),
        ((), 400_000, True),
        ((), 100_000, False),  # takes longer than the training, but seconds
        (("steps=4000", "validate_every=4000"), 2_000_000, False),
        (("validate_tokens=10000",), 4_000_000, False),
        (("validate_tokens=10000", "callbacks.final_score.tokens=4000000"), 4_000_000, True),
        (("trainer.fast_dev_run=2",), 4_000_000, False),
    ],
)
def test_validation_that_takes_longer_than_training_is_a_warning(words, split: int, warns: bool, monkeypatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(plan_report.log, "warning", lambda text, *values: messages.append(text % values))
    plan_report.warn_of_long_validation(resolved(composed(*SHORT, *words)), 4096, split)
    assert bool(messages) == warns
    assert all("validate_tokens=N" in message for message in messages)


@pytest.mark.parametrize(
    ("words", "scored"),
    [
        ((), 64_000),  # a quarter of 1,000 steps of 256 tokens
        (("steps=20",), 3200),
        (("steps=1000000",), 10_000_000),
        (("validate_tokens=full",), 10_000_000),
        (("callbacks.final_score.tokens=500",), 500),
        (("callbacks.final_score=null",), 0),
    ],
)
def test_the_final_score_reads_a_quarter_of_the_trained_tokens(words: tuple[str, ...], scored: int) -> None:
    assert composed(*KEYS, *words).most_scored == scored
