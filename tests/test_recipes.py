"""Published recipes: each composes and passes the checks at full size, and a tiny twin of each really trains.

A twin has the recipe's loss, optimizer, schedule and start, and sizes, data and number of steps of seconds.
"""

import itertools
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train
from gpt2lab import metric_names
from gpt2lab.storage.metrics_csv import read_metrics, series
from gpt2lab.storage.report_json import read_report
from launch import exit_codes
from launch.checks import checks
from launch.config import run_spec
from launch.config.run_spec import PreparedSpec
from launch.config.schema import RunConfig
from tests.conftest import ROOT, SHRUNK, Train
from tests.support.configurations import composed

RECIPES = ("distilgpt2_owt", "gpt2_124m_fineweb", "minillm_dolly")
# Required values of each, from the sources in its header.
PROMISED: dict[str, dict[str, Any]] = {
    "distilgpt2_owt": {
        "loss": {"name": "forward_kl", "temperature": 2.0, "scale_t2": True, "hard_weight": 0.5},
        "optimizer": {"name": "adamw", "lr": 5e-4, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.0},
        "schedule": {"name": "linear", "final_fraction": 0.0},
        "gradient_clip": 5.0,
    },
    "gpt2_124m_fineweb": {
        "optimizer": {"name": "adamw", "lr": 6e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
        "schedule": {"name": "cosine", "final_fraction": 0.0},
        "gradient_clip": 1.0,
    },
    "minillm_dolly": {
        "loss": {"name": "reverse_kl", "temperature": 1.0, "hard_weight": 0.0},
        "sequences": {"name": "gkd", "lmbda": 1.0, "gen_temperature": 1.0},
        "optimizer": {"name": "adamw", "lr": 5e-6, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 1e-6},
        "schedule": {"name": "constant"},
        "gradient_clip": 1.0,
    },
}
# One thread: on a busy machine, steps of milliseconds lose more by waiting for a second one than they gain.
TINY = [word for word in SHRUNK if not word.startswith("model.n_layer")] + ["threads=1"]
STEPS = ["steps=40", "validate_every=8", "checkpoint_every=40", "schedule.warmup_steps=4"]


def header(recipe: str) -> str:
    """Return the comment at the head of a recipe."""
    lines = (ROOT / f"conf/experiment/{recipe}.yaml").read_text().splitlines()
    return "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))


def commands(recipe: str) -> list[str]:
    """Return its commands, continuation lines joined."""
    return re.findall(r"^#   python train\.py (.*)$", header(recipe).replace("\\\n#", ""), flags=re.MULTILINE)


def promised(recipe: str, config: RunConfig) -> dict[str, Any]:
    """Return the settings at the keys of PROMISED."""
    found: dict[str, Any] = {}
    for key, wanted in PROMISED[recipe].items():
        value = vars(config)[key]
        found[key] = {name: vars(value)[name] for name in wanted} if isinstance(wanted, dict) else value
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_header_has_its_cost_and_published_values(recipe: str) -> None:
    text = header(recipe)
    for words in (
        "Source:",
        "Cost:",
        "Published score:",
        "What differs from the original",
        "Estimate",
        "unrun at size",
    ):
        assert words in text, words
    assert re.search(r"arXiv \d{4}\.\d{5}|karpathy/llm\.c", text)
    assert len(commands(recipe)) == 2
    assert commands(recipe)[0] == f"experiment={recipe} devices=8 strategy=ddp"


@pytest.mark.parametrize(("recipe", "number"), [(recipe, number) for recipe in RECIPES for number in range(2)])
def test_every_header_command_composes_and_passes_the_checks(recipe: str, number: int) -> None:
    checks.check(composed(*shlex.split(commands(recipe)[number])))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_the_published_values(recipe: str) -> None:
    assert promised(recipe, composed(f"experiment={recipe}")) == PROMISED[recipe]


def test_recipes_train_on_the_data_of_their_headers() -> None:
    fineweb, distil = composed("experiment=gpt2_124m_fineweb"), composed("experiment=distilgpt2_owt")
    assert fineweb.steps * fineweb.batch_tokens == pytest.approx(10.26e9, rel=1e-3)
    assert distil.steps * distil.batch_tokens == pytest.approx(3 * 9.04e9, rel=2e-3)
    assert distil.batch_tokens == 2000 * distil.context
    minillm = composed("experiment=minillm_dolly")
    assert minillm.data["prompt"].endswith(".\n\n### Instruction:\n{source}\n\n### Response:\n")
    assert minillm.steps * minillm.batch_sequences * minillm.context == pytest.approx(164e6, rel=2e-3)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, cache: Path, whole_sources: Path) -> Path:
    """A folder with a teacher of twelve layers, a student that has begun to learn, and pairs of successive lines."""
    folder = tmp_path_factory.mktemp("project")
    text = [line.strip() for file in sorted(whole_sources.glob("*.py")) for line in file.read_text().splitlines()]
    lines = [line for line in text if line.isprintable() and 8 < len(line) < 20]
    pairs = ["\t".join(pair) for pair in itertools.pairwise(lines[:400])]
    (folder / "pairs.tsv").write_text("\n".join(["source\ttarget", *pairs]) + "\n")
    words = [*TINY, f"path={whole_sources}", "optimizer.lr=1e-2", "schedule.warmup_steps=4", "compile=false"]
    teacher = [*words, "name=teacher", "model.n_layer=12", "steps=150"]
    started = [word for word in words if not word.startswith("vocab_size")]
    started += ["name=started", "model.n_layer=2", "steps=10"]
    started += ["tokenizer=hub", "tokenizer.source=runs/pretrain/teacher/hf"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GPT2LAB_CACHE", str(cache))
        patch.setenv("HF_HUB_OFFLINE", "1")
        for command in (teacher, started):
            patch.setattr(sys, "argv", [str(ROOT / "train.py"), *command])
            assert exit_codes.exit_code(train.command_line) == 0
    return folder


def logged(run: Path, name: str) -> list[float]:
    return [value for _, value in series(read_metrics(run), name)]


def run_twin(recipe: str, train_here: Train, run: Path, fall: float, *words: str) -> PreparedSpec:
    """Train; check that the run finished and val/loss fell by at least `fall` nats; return its configuration."""
    done = train_here(f"experiment={recipe}", *words, *STEPS, f"run_dir={run}")
    assert done.code == 0, done.stderr
    assert read_report(run)["status"] == "finished"
    losses = logged(run, metric_names.VAL_LOSS)
    assert len(losses) == 5
    assert losses[-1] < losses[0] - fall, "after forty steps and after eight"
    return run_spec.load(run / "config.yaml")


@pytest.mark.slow
def test_distilgpt2_keeps_six_evenly_spaced_layers_and_learns(
    project: Path, train_here: Train, tmp_path: Path, whole_sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    words = [*TINY, f"path={whole_sources}", "teacher=runs/pretrain/teacher"]
    # It starts near its best loss, with its teacher's layers.
    spec = run_twin("distilgpt2_owt", train_here, tmp_path / "run", 0.005, *words)
    assert promised("distilgpt2_owt", spec.config) == PROMISED["distilgpt2_owt"]
    assert spec.config.init == "teacher_layers"
    assert spec.resolved.teacher_layers["layers"] == [0, 2, 4, 7, 9, 11]
    assert spec.config.model.dropout == 0.1
    divergence = logged(tmp_path / "run", metric_names.DISTILL_KL)
    assert divergence[-1] < divergence[0]


def test_gpt2_on_fineweb_learns(train_here: Train, tmp_path: Path, tiny: list[str]) -> None:
    spec = run_twin("gpt2_124m_fineweb", train_here, tmp_path / "run", 0.1, *tiny, "threads=1")
    assert promised("gpt2_124m_fineweb", spec.config) == PROMISED["gpt2_124m_fineweb"]
    assert spec.config.init == "scratch"


@pytest.mark.slow
def test_minillm_distils_a_started_student_on_pairs(
    project: Path, train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    words = ["data=pairs", "path=pairs.tsv", "val_fraction=0.3", "data.prompt='{source} -> '"]
    words += [
        "context=32",
        "sequences.max_new_tokens=12",
        "batch_sequences=16",
        "threads=1",
        "precision=fp32",
        "logger=none",
        "callbacks=minimal",
    ]
    words += ["teacher=runs/pretrain/teacher", "init=runs/pretrain/started"]
    words += ["optimizer.lr=3e-3"]  # the published 5e-6 is for steps by the thousand
    spec = run_twin("minillm_dolly", train_here, tmp_path / "run", 0.05, *words)
    config = replace(spec.config, optimizer=replace(spec.config.optimizer, lr=5e-6))
    assert promised("minillm_dolly", config) == PROMISED["minillm_dolly"]
    reverse = logged(tmp_path / "run", metric_names.DISTILL_REVERSE_KL)
    assert reverse[-1] < reverse[0], "what it minimizes"
