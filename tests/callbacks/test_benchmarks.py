"""Benchmarks during training: logged with errors, equal to evaluate.py, without influence on training."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from gpt2lab.metric_names import benchmark_scores
from gpt2lab.storage.metrics_csv import read_metrics, series
from gpt2lab.storage.report_json import read_report
from tests.conftest import Command, Train, needs_two_cores
from tests.support.lm_eval_task import TASK
from tests.support.stop_signal import stop_keys

ACCURACY = "benchmarks/tiny_completion/acc"
RUN = ("steps=6", "validate_every=3", "callbacks.checkpoint.verify_export=false", "model.dropout=0.1", "ema=0.5")
RUN += ("optimizer.lr=0.01", "micro_batch=4", "seed=3")
BENCHMARKS = ("callbacks=benchmarks", "callbacks.benchmarks.tasks=[tiny_completion]", "callbacks.benchmarks.every=2")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task whose questions are beginnings of lines of Python code."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    text = Path(json.__file__).read_text()
    questions = [
        {"question": text[at : at + 20], "choices": [text[at + 20 : at + 24], "zz"], "answer": at % 2}
        for at in range(0, 1200, 61)
    ]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "tiny.yaml").write_text(TASK.format(file=folder / "test.jsonl"))
    return folder


def losses(run: Path) -> list[tuple[int, float]]:
    rows = read_metrics(run)
    return series(rows, "train/loss") + series(rows, "val/loss")


@pytest.mark.slow
def test_benchmarks_are_logged_and_leave_training_as_it_is(
    train_here: Train, evaluate_here: Command, tiny: list[str], tasks: Path, tmp_path: Path
) -> None:
    assert train_here(*tiny, *RUN, "callbacks=default", "run_dir=plain").code == 0
    ended = train_here(*tiny, *RUN, *BENCHMARKS, f"callbacks.benchmarks.path={tasks}", "run_dir=run")
    assert ended.code == 0, ended.stderr
    run = tmp_path / "run"
    assert losses(run) == losses(tmp_path / "plain")
    weights = [load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("plain", "run")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    rows = read_metrics(run)
    assert [step for step, _ in series(rows, ACCURACY)] == [2, 4, 6]
    assert [step for step, _ in series(rows, f"{ACCURACY}_stderr")] == [2, 4, 6]
    assert "tiny_completion/acc" in ended.stderr
    assert "examples/s" not in ended.stderr, "a progress bar in a pipe"
    words = ["lm_eval=tiny_completion", f"lm_eval_path={tasks}", "lm_eval_limit=0", "json=scores.json"]
    assert evaluate_here("checkpoint=run", *words).code == 0
    last = series(rows, ACCURACY)[-1][1]
    scored = json.loads(Path("scores.json").read_text())["zero_shot"]["tiny_completion/acc"]
    assert (last, series(rows, f"{ACCURACY}_stderr")[-1][1]) == pytest.approx(
        (scored["value"], scored["standard_error"]), abs=1e-6
    )
    card = ModelCard.load(run / "hf" / "README.md")
    (found,) = [one for one in card.data.eval_results if "tiny_completion" in one.dataset_name]
    assert (found.metric_type, found.metric_value, found.dataset_type) == ("acc", pytest.approx(last), "unknown")
    assert "| acc | " in card.text
    assert ACCURACY in (run / "report.html").read_text()
    assert benchmark_scores(read_report(run)["metrics"])["tiny_completion", "acc"][0] == pytest.approx(last)


@pytest.mark.slow
@needs_two_cores
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_log_the_benchmarks_of_one(
    strategy: str, train_here: Train, tiny: list[str], tasks: Path, tmp_path: Path
) -> None:
    found: dict[int, Any] = {}
    for devices in (1, 2):
        words = (f"strategy={strategy if devices > 1 else 'auto'}", f"devices={devices}", f"run_dir={devices}")
        keys = ("model.dropout=0", "accelerator=cpu", f"callbacks.benchmarks.path={tasks}")
        ended = train_here(*tiny, *RUN, *BENCHMARKS, *keys, *words)
        assert ended.code == 0, ended.stderr
        found[devices] = series(read_metrics(tmp_path / str(devices)), ACCURACY)
    assert found[1] == found[2]


@pytest.mark.slow
def test_benchmark_ended_by_a_signal_is_repeated_on_resume(
    train_here: Train, tiny: list[str], tasks: Path, tmp_path: Path
) -> None:
    keys = [*tiny, *RUN, *BENCHMARKS, f"callbacks.benchmarks.path={tasks}", "log_every=1"]
    assert train_here(*keys, "run_dir=whole").code == 0
    stopped = train_here(*keys, "run_dir=run", *stop_keys(steps=3))
    assert stopped.code == 75, stopped.stderr
    assert [step for step, _ in series(read_metrics(tmp_path / "run"), ACCURACY)] == [2]
    resumed = train_here("resume=run", "allow_targets=[tests]")
    assert resumed.code == 0, resumed.stderr
    whole, found = (series(read_metrics(tmp_path / name), ACCURACY) for name in ("whole", "run"))
    assert found == whole


ERRORS = [
    (["callbacks.benchmarks.tasks=[]"], "callbacks.benchmarks.tasks is empty"),
    (["callbacks.benchmarks.path=/nowhere/at/all"], "callbacks.benchmarks.path=/nowhere/at/all: there is no such"),
    (["objective=mlm"], "causal models only"),
]
OF_HARNESS = [  # whose import takes seconds
    (["callbacks.benchmarks.tasks=[tiny_completoin]"], "callbacks.benchmarks.tasks=tiny_completoin: no such task"),
    (["callbacks.benchmarks.tasks=[lambada_openai]"], "callbacks.benchmarks.tasks=lambada_openai: the data of this"),
]


@pytest.mark.parametrize(
    ("words", "message"), [*ERRORS, *(pytest.param(*case, marks=pytest.mark.slow) for case in OF_HARNESS)]
)
def test_tasks_that_cannot_be_run_end_before_training(
    words: list[str], message: str, train_here: Train, tiny: list[str], tmp_path: Path
) -> None:
    ended = train_here(*tiny, "steps=2", "callbacks=benchmarks", "run_dir=run", *words)
    assert ended.code == 2
    assert message in ended.stderr
    assert len(ended.stderr.strip().splitlines()) <= 5
    assert not (tmp_path / "run").exists()


def test_missing_package_is_named_with_its_command(
    train_here: Train, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    ended = train_here(*tiny, "steps=2", "callbacks=benchmarks")
    assert ended.code == 2
    assert 'pip install "lm-eval>=0.4.13"' in ended.stderr
