"""profile=START:COUNT and callbacks=layer_stats: what they write, and that training is unchanged."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch.config.groups import CONF
from launch.config.unused_keys import check_unused_keys
from lightning_modules.language_model import LanguageModel
from tests.conftest import Train, needs_two_cores
from tests.support.configurations import composed


def steps_in(trace: Path) -> int:
    """Count the optimizer steps; one may be recorded twice, by its class and by the class that it derives from."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    named = [event for event in events if event.get("name") == "Optimizer.step#MuonWithAdamW.step"]
    ends = sorted((event["ts"], event["ts"] + event["dur"]) for event in named)
    return sum(not any(first < start and end < last for first, last in ends) for start, end in ends)


LAYER_STATS = ("callbacks=layer_stats", "callbacks.checkpoint.verify_export=false", "log_every=2")


@pytest.mark.parametrize(
    ("given", "steps"),
    [pytest.param("0:1", 1, marks=pytest.mark.slow), ("2:3", 3), pytest.param("7:20", 1, marks=pytest.mark.slow)],
)
def test_profile_records_the_given_steps(given: str, steps: int, train_here: Train, tiny: list[str], tmp_path: Path):
    answer = train_here(*tiny, "steps=8", "name=run", f"profile={given}")
    assert "USDT" not in answer.stderr, "PyTorch's own lines"
    folder = tmp_path / "runs/pretrain/run/profile"
    assert steps_in(folder / "trace-rank0.json.gz") == steps
    tables = (folder / "operations-rank0.txt").read_text()
    assert "By time" in tables
    assert "By allocated memory" in tables
    assert "aten::" in tables


def test_profile_and_layer_stats_keep_the_weights(train_here: Train, tiny: list[str], tmp_path: Path):
    train_here(*tiny, "steps=6", "name=plain")
    train_here(*tiny, "steps=6", "name=watched", "profile=2:2", *LAYER_STATS)
    plain, watched = (
        load_file(tmp_path / f"runs/pretrain/{name}/hf/model.safetensors") for name in ("plain", "watched")
    )
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_a_profiled_step_that_fails_reports_its_own_error(
    train_here: Train, tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    """PyTorch's profiler has been stopped, so that the next run of this process can start it again."""
    honest = LanguageModel.training_step

    def fails(self: LanguageModel, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == 3:
            raise RuntimeError("no memory left")
        return honest(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(LanguageModel, "training_step", fails)
        answer = train_here(*tiny, "steps=8", "name=run", "profile=2:5")
    assert answer.code == 1
    assert "no memory left" in answer.stderr
    assert not Path("runs/pretrain/run/profile").exists(), "an incomplete trace"
    assert train_here(*tiny, "steps=3", "name=next", "profile=1:1").code == 0


def test_a_resumed_run_warns_that_nothing_is_profiled(train_here: Train, tiny: list[str]):
    keys = (*tiny, "run_dir=run", "checkpoint_every=4", "profile=2:1")
    assert train_here(*keys, "steps=4").code == 0
    answer = train_here("resume=run", "steps=6")
    assert answer.code == 0, answer.stderr
    assert "Nothing is profiled: step 4 is done, and the last one to profile is 3." in answer.stderr


def test_a_run_resumed_among_the_profiled_steps_records_the_rest(train_here: Train, tiny: list[str]):
    assert train_here(*tiny, "run_dir=run", "checkpoint_every=4", "steps=4").code == 0
    answer = train_here("resume=run", "steps=8", "profile=2:4")
    assert answer.code == 0, answer.stderr
    assert "profile of steps 5 to 6" in answer.stderr
    assert steps_in(Path("run/profile/trace-rank0.json.gz")) == 2


@pytest.mark.parametrize("profiler", ["simple", pytest.param("advanced", marks=pytest.mark.slow)])
def test_profilers_of_lightning_write_their_report(profiler: str, train_here: Train, tiny: list[str]):
    assert train_here(*tiny, "steps=2", "run_dir=run", f"trainer.profiler={profiler}").code == 0
    report = Path("run/fit-profile.txt").read_text()
    assert "training_step" in report


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("profile=3",), "profile=3 is not START:COUNT"),
        (("profile=3:0",), "is not START:COUNT, with a COUNT of 1 to 100"),
        (("profile=3:1000",), "COUNT of 1 to 100"),
        (("profile=-1:2",), "is not START:COUNT"),
        (("profile=8:2",), "begins after the last step, 8"),
        (("profile=1:2", "trainer.profiler=pytorch"), "runs once in a process"),
        (("profile=1:2", "callbacks.profile=null"), "does not read profile"),
    ],
)
def test_steps_that_cannot_be_profiled_are_refused(
    words: tuple[str, ...], message: str, train_here: Train, tiny: list[str]
):
    answer = train_here(*tiny, "steps=8", *words)
    assert answer.code == 2
    assert message in answer.stderr


def test_steps_beyond_a_number_of_epochs_are_refused(train_here: Train, tiny: list[str]):
    answer = train_here(*tiny, "epochs=0.1", "profile=5000:2")
    assert answer.code == 2
    assert "profile=5000:2 begins after the last step" in answer.stderr


@pytest.mark.parametrize("group", sorted(file.stem for file in (CONF / "callbacks").glob("*.yaml")))
def test_every_group_of_callbacks_can_be_profiled(group: str):
    config = composed(f"callbacks={group}", "profile=2:1")
    assert config.callbacks["profile"]["steps"] == "2:1"
    check_unused_keys(config)


ONE, TWO_RANKS = ("micro_batch=1",), ("devices=2", "accelerator=cpu")


@pytest.mark.parametrize(
    "machine",
    [
        ONE,
        pytest.param((*TWO_RANKS, "strategy=ddp"), marks=[pytest.mark.slow, needs_two_cores]),
        pytest.param((*TWO_RANKS, "strategy=fsdp"), marks=[pytest.mark.slow, needs_two_cores]),
    ],
    ids=["one", "ddp", "fsdp"],
)
def test_layer_stats_add_up_to_the_gradient_norm(
    machine: tuple[str, ...], train_here: Train, tiny: list[str], tmp_path: Path
):
    train_here(*tiny, "steps=4", "name=run", *LAYER_STATS, *machine)
    rows = [row for row in csv.DictReader((tmp_path / "runs/pretrain/run/metrics.csv").open()) if row["step"] == "4"]
    row = {name: float(value) for part in rows for name, value in part.items() if value}
    layers = ["embeddings", "block_00", "block_01", "final_norm"]
    norms = [row[f"layers/grad_norm/{layer}"] for layer in layers]
    assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(row["grad_norm"], rel=1e-4)
    assert all(0 < row[f"layers/update_ratio/{layer}"] < 1 for layer in layers)


def test_update_ratio_is_that_of_the_weights_of_two_steps(train_here: Train, tiny: list[str], tmp_path: Path):
    """Two runs share the first step; the second makes one more."""
    usual = (*LAYER_STATS[:2], "schedule=constant", "schedule.warmup_steps=0", "logger=csv", "log_every=1")
    weights = []
    for steps in (1, 2):
        answer = train_here(*tiny, *usual, f"steps={steps}", f"run_dir={tmp_path / str(steps)}")
        assert answer.code == 0, answer.stderr
        weights.append(load_file(tmp_path / str(steps) / "hf/model.safetensors"))
    before, after = (
        torch.cat([one.flatten() for name, one in found.items() if ".h.1." in name or name.startswith("h.1.")])
        for found in weights
    )
    rows = csv.DictReader((tmp_path / "2/metrics.csv").open())
    logged = [row["layers/update_ratio/block_01"] for row in rows if row["step"] == "2"]
    expected = float((after - before).norm() / before.norm())
    assert [float(value) for value in logged if value] == pytest.approx([expected], rel=1e-3)
