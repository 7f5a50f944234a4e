"""Length of training: epochs, trainer.max_time and trainer.fast_dev_run; the schedule follows the resulting steps."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.optim.schedules import learning_rate_factor
from gpt2lab.storage.metrics_csv import read_metrics, series
from gpt2lab.storage.report_json import read_report
from launch.config import run_spec
from launch.config.run_spec import PreparedSpec
from launch.run import build, job, plan_data
from tests.conftest import Train
from tests.support.configurations import composed, resolved

SHORT = ("log_every=1", "validate_every=1000", "checkpoint_every=1000", "callbacks.checkpoint.verify_export=false")


def spec_of(run: Path) -> PreparedSpec:
    return run_spec.load(run / "config.yaml")


def assert_schedule_ends(run: Path) -> None:
    """The learning rates are those of a schedule that ends with the last step of the run."""
    config, rates = spec_of(run).config, series(read_metrics(run), "lr")
    assert rates[-1][0] == config.steps
    used = [config.optimizer.lr * learning_rate_factor(step - 1, config.steps, config.schedule) for step, _ in rates]
    assert [rate for _, rate in rates] == pytest.approx(used, rel=1e-5)


def test_epochs_count_passes_over_the_data(train_here: Train, tiny: list[str], tmp_path: Path):
    run = tmp_path / "run"
    answer = train_here(*tiny, *SHORT, "batch_tokens=2048", "epochs=0.5", "run_dir=run")
    assert answer.code == 0, answer.stderr
    report = read_report(run)
    windows = (report["data"]["tokens"] - 1) // 32
    assert report["steps"] == spec_of(run).config.steps == math.ceil(0.5 * windows / 64)
    assert_schedule_ends(run)
    answer = train_here("resume=run", "epochs=0.7")  # a resumed run may be given another number of them
    assert answer.code == 0, answer.stderr
    assert read_report(run)["steps"] == spec_of(run).config.steps == math.ceil(0.7 * windows / 64)
    answer = train_here("resume=run", "epochs=0.1")
    assert answer.code == 2
    assert "epochs=0.1" in answer.stderr
    answer = train_here("resume=run", f"steps={report['steps'] + 4}")
    assert answer.code == 0, answer.stderr
    assert (spec_of(run).config.epochs, read_report(run)["steps"]) == (None, report["steps"] + 4)


@pytest.mark.parametrize(
    "words",
    [
        ("steps=10", "epochs=2"),
        ("epochs=2", "steps=10", "task=distill"),
        ("resume=run", "steps=10", "epochs=2"),
        ("experiment=gpt2_124m_fineweb", "steps=10", "epochs=2"),
    ],
)
def test_steps_and_epochs_together_are_refused(words: tuple[str, ...], train_here: Train):
    answer = train_here(*words)
    assert answer.code == 2
    assert "steps=10 and epochs=2 both set the length of training" in answer.stderr


@pytest.mark.parametrize(
    ("data", "before"), [("text", "at most"), ("pairs", "UNKNOWN until the data are prepared, by")]
)
def test_a_plan_counts_the_steps_of_epochs_in_prepared_data(data: str, before: str, sources: Path, tmp_path: Path):
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("source\ttarget\n" + "".join(f"question {number}\tanswer\n" for number in range(90)))
    path = {"text": sources, "pairs": pairs}[data]
    keys = ("epochs=3", "context=32", "val_fraction=0.3", f"cache_dir={tmp_path / 'cache'}", "accelerator=cpu")
    spec = resolved(composed(*keys, f"data={data}", f"path={path}"))
    assert plan_data.find_prepared(spec) is None
    assert before in plan_data.with_counted_steps(spec, None)[1]
    assert not (tmp_path / "cache").exists()
    module = build.data_module(spec)
    module.prepare()
    counted, note = plan_data.with_counted_steps(spec, plan_data.find_prepared(spec))
    assert counted.config.steps == math.ceil(3 * len(module.train_samples) / spec.config.global_batch_rows)
    assert note == "epochs=3: counted in the prepared data"


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_fast_dev_run_has_a_schedule_of_its_steps(steps: int, train_here: Train, tiny: list[str], tmp_path: Path):
    given: Any = "true" if steps == 1 else steps
    answer = train_here(*tiny, *SHORT, f"trainer.fast_dev_run={given}", "micro_batch=4", "steps=500", "run_dir=run")
    assert answer.code == 0, answer.stderr
    assert (read_report(tmp_path / "run")["steps"], spec_of(tmp_path / "run").config.steps) == (steps, steps)
    assert read_report(tmp_path / "run")["status"] == "finished"


def test_a_run_out_of_time_is_resumed_with_more(train_here: Train, tiny: list[str], tmp_path: Path):
    """A limit of no time stops before the first step, whatever the speed of the machine."""
    answer = train_here(*tiny, *SHORT, "steps=3", "trainer.max_time=00:00:00:00", "run_dir=run")
    assert answer.code == 0, answer.stderr
    assert read_report(tmp_path / "run")["steps"] < 3
    answer = train_here("resume=run", "trainer.max_time=01:00:00:00")
    assert answer.code == 0, answer.stderr
    assert (read_report(tmp_path / "run")["steps"], read_report(tmp_path / "run")["status"]) == (3, "finished")
    answer = train_here("resume=run", "trainer.profiler=simple")
    assert answer.code == 2


def test_steps_replace_the_epochs_of_a_recipe():
    recipe = replace(composed("steps=7"), epochs=3.0)
    assert job.with_given_length(recipe).epochs is None
    assert job.with_given_length(replace(composed(), epochs=3.0)).epochs == 3.0
