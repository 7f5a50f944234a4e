"""docs/extending.md: its example package, configuration folder and programs, run from a folder outside the checkout."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import evaluate
from gpt2lab.errors import InputError
from gpt2lab.storage.metrics_csv import read_metrics
from launch import exit_codes
from launch.checks import checks
from tests.conftest import ROOT, SHRUNK, Answer, Train, environment
from tests.support.configurations import composed
from tests.support.extending import PAGE, forgetting_plugins, write_examples
from tests.test_readme import commands

SMALL = [key for key in SHRUNK if not key.startswith(("data=", "logger="))]
WIDE = [key for key in SMALL if not key.startswith("model.")]


def on_page(*words: str) -> list[str]:
    """Return the arguments of the page's train.py commands that contain one of these words, without placeholders."""
    found = [command for command in commands("train.py", [PAGE.read_text()]) if any(word in command for word in words)]
    assert len(found) == len(words)
    return list(dict.fromkeys(word for command in found for word in shlex.split(command)))


@pytest.fixture
def outside(tmp_path: Path, sources: Path) -> Iterator[Path]:
    """Write the files of the page and some text into the working directory."""
    write_examples(tmp_path)
    (tmp_path / "notes.txt").write_text(
        "".join(f"{number} and {number + 1} make {2 * number + 1}.\n" for number in range(400))
    )
    with forgetting_plugins():
        yield tmp_path


@pytest.fixture
def teacher(train_here: Train, outside: Path) -> Path:
    ended = train_here(*SMALL, "data=text", "path=notes.txt", "logger=none", "steps=2", "run_dir=teacher")
    assert ended.code == 0, ended.stderr
    return outside / "teacher"


ONE_DISTILLATION = ("loss.name=squared_error optimizer.name", "StopBelow", "JsonLines", "mypkg.data.Lines")


def distillation() -> list[str]:
    """Train one run with the page's functions, logger and data; its callback ends it at the first validation."""
    return [
        *(word.replace("value=1.5", "value=100") for word in on_page(*ONE_DISTILLATION)),
        *(
            *SMALL,
            "teacher=teacher",
            "preflight=off",
            "steps=6",
            "schedule.warmup_steps=1",
            "validate_every=3",
            "log_every=1",
        ),
    ]


def check_distillation(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["steps"] == 3, "the callback ends the run"
    logged = [json.loads(line) for line in Path("losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "train/loss" in line] == [1, 2, 3]
    rates = [float(row["lr"]) for row in read_metrics(run) if row.get("lr")]
    assert rates[1] > rates[2] > 0, "the schedule falls after the warm-up"
    stored = yaml.safe_load((run / "config.yaml").read_text())["config"]
    assert stored["plugins"] == ["mypkg"]
    assert stored["loss"]["name"] == "squared_error"
    assert report["data"]["name"] == "text"


@pytest.mark.slow
def test_functions_and_classes_of_the_page_train(train_here: Train, teacher: Path):
    ended = train_here(*distillation(), "run_dir=run")
    assert ended.code == 0, ended.stderr
    check_distillation(Path("run"))
    stored = json.loads(json.dumps(yaml.safe_load(Path("run/config.yaml").read_text())))
    assert "allow_targets" not in stored["config"]


def test_the_task_of_the_page_trains_other_targets(train_here: Train, outside: Path):
    keys = [*SMALL, "data=text", "path=notes.txt", "logger=none", "steps=2", "log_every=1"]
    assert train_here(*keys, "run_dir=all").code == 0
    ended = train_here(*keys, *on_page("LateTokens"), "run_dir=late")
    assert ended.code == 0, ended.stderr
    all_losses, late = ([row["train/loss"] for row in read_metrics(Path(run))] for run in ("all", "late"))
    assert all_losses != late


def test_the_files_of_the_page_train_and_plugins_need_permission(train_here: Train, teacher: Path):
    shared = [key for key in WIDE if not key.startswith("vocab_size")]
    small = [*shared, "data=text", "path=notes.txt", "logger=none", "teacher=teacher", "preflight=off"]
    given = [word for word in on_page("wide_student") if not word.startswith("steps")]
    ended = train_here(*given, *small, "model.n_positions=64", "steps=1", "run_dir=run")
    assert ended.code == 0, ended.stderr
    stored = yaml.safe_load(Path("run/config.yaml").read_text())["config"]
    assert stored["loss"]["name"] == "squared_error"
    assert stored["model"]["n_embd"] == 256
    assert stored["optimizer"]["lr"] == 2e-3
    ended = train_here("resume=run", "steps=2")
    assert ended.code == 2
    assert "allow_targets=[mypkg]" in ended.stderr
    ended = train_here("resume=run", "steps=2", "plugins=[mypkg]")
    assert ended.code == 0, ended.stderr


def test_a_metric_of_the_page_scores_pairs(train_here: Train, outside: Path, monkeypatch, capfd):
    rows = [{"source": f"count to {number}", "target": " ".join(map(str, range(number % 7)))} for number in range(90)]
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    keys = [word for word in on_page("same_length") if not word.startswith("data=")]
    small = [key for key in SMALL if not key.startswith("batch_tokens")]
    pairs = ["data=pairs", "path=pairs.jsonl", "batch_sequences=8", "model=nano", "init=scratch", "logger=none"]
    texts = ["task.text.max_new_tokens=8", "task.text.examples=8"]
    ended = train_here(*keys, *small, *pairs, *texts, "steps=1", "run_dir=run")
    assert ended.code == 0, ended.stderr
    assert json.loads(Path("run/report.json").read_text())["watched_metric"] == "val/same_length"

    def score(*words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "checkpoint=run", "texts=4", *words])
        code = exit_codes.exit_code(evaluate.main)
        return Answer(code, *capfd.readouterr())

    assert "allow_targets=[mypkg]" in score().stderr
    ended = score("plugins=[mypkg]", "metrics=same_length")
    assert ended.code == 0, ended.stderr
    assert "same_length" in ended.stdout


def test_early_stopping_can_watch_an_added_metric(outside: Path, monkeypatch: pytest.MonkeyPatch):
    """That of a plugin, or one that a class of the user logs."""
    monkeypatch.chdir(outside)
    early = ["callbacks.early._target_=lightning.pytorch.callbacks.EarlyStopping"]
    of_plugin = ["plugins=[mypkg]", "task=finetune", "data=summarize", "init=gpt2", "task.text.metrics=[same_length]"]
    checks.check(composed(*early, "callbacks.early.monitor=val/same_length", *of_plugin))
    checks.check(composed(*early, "callbacks.early.monitor=own", "callbacks.stop._target_=mypkg.callback.StopBelow"))
    with pytest.raises(InputError, match="no such metric"):
        checks.check(composed(*early, "callbacks.early.monitor=own"))


def test_added_divergence_reads_no_key_of_another(outside: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(outside)
    keys = ["plugins=[mypkg]", "task=distill", "loss.name=squared_error"]
    checks.check(composed(*keys, "loss.temperature=2"))
    with pytest.raises(InputError, match=r"does not read loss\.alpha"):
        checks.check(composed(*keys, "loss.alpha=0.3"))


def test_a_plugin_that_does_not_exist_is_named(train_here: Train, outside: Path):
    ended = train_here(*SMALL, "plugins=[mypgk]")
    assert ended.code == 2
    assert "there is no package mypgk" in ended.stderr
    ended = train_here(*SMALL, "plugins=[my pkg]")
    assert ended.code == 2
    assert "plugins=[my pkg]" in ended.stderr


# Processes like those of a user, from a folder outside the checkout


def in_process(cache: Path, *words: str | Path) -> Answer:
    variables = {name: value for name, value in environment(cache).items() if name != "PYTHONPATH"}
    ended = subprocess.run([sys.executable, *map(str, words)], env=variables, capture_output=True, text=True)
    return Answer(ended.returncode, ended.stdout, ended.stderr)


@pytest.mark.slow
def test_ranks_and_jobs_of_a_sweep_import_plugins(teacher: Path, cache: Path):
    keys = [word for word in distillation() if not word.startswith(("optimizer.name", "callbacks.stop"))]
    for more, folders in (
        (["devices=2", "run_dir=ranks"], ["ranks"]),
        (["-m", "optimizer.name=nadam,adamw", "hydra.sweep.dir=sweep"], ["sweep/0", "sweep/1"]),
        (["launcher=slurm", "launcher.executor=local", "run_dir=submitted"], ["submitted"]),
    ):
        ended = in_process(cache, ROOT / "train.py", *keys, *more, "accelerator=cpu", "steps=2")
        assert ended.code == 0, ended.stderr
        for folder in folders:
            stored = yaml.safe_load(Path(folder, "config.yaml").read_text())["config"]
            assert stored["loss"]["name"] == "squared_error"
            assert json.loads(Path(folder, "report.json").read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("program", ["use_run.py", "own_trainer.py"])
def test_a_program_of_the_page_runs(program: str, teacher: Path, cache: Path, monkeypatch):
    Path("student").symlink_to("teacher")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ended = subprocess.run([sys.executable, program], env=environment(cache), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()
