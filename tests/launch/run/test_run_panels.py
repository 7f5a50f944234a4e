"""What a run prints on the terminal before its first step and after its last; the next commands work when pasted."""

import html
import io
import itertools
import json
import os
import re
import shlex
import sys
from contextlib import closing
from pathlib import Path

import pytest

import generate
from callbacks.report import Report
from gpt2lab.reports.next_commands import next_commands
from gpt2lab.reports.run_report import write_report
from gpt2lab.settings import DataFacts
from launch.checks import checks
from launch.config.key_value_cli import parse
from launch.config.run_dir import RunDirectory
from launch.evaluate.score_checkpoints import Arguments as EvaluateArguments
from launch.generate import serve
from launch.generate.generator import Arguments as GenerateArguments
from launch.run import build, job, run_panels, run_uses
from tests.conftest import ROOT, Command, Distil, Train, command_here
from tests.support.configurations import composed, prepared, resolved
from tests.support.pseudo_terminal import PseudoTerminal

PLAYGROUND = "playground in the browser"
START = ("model", "data", "device", "precision", "steps", "memory", "time", "run", "page")
FINISHED = {"status": "finished", "watched": 4.0, "watched_metric": "val/loss"}
RUNS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "pretrain": (
        ("model=micro", "data=text", "path=a folder"),
        {"evaluate", "generate text", PLAYGROUND, "distill", "fine-tune", "train longer"},
    ),
    "smallest model": (
        ("model=nano",),
        {"evaluate", "generate text", PLAYGROUND, "fine-tune", "train longer"},
    ),
    "masks": (("model=nano", "objective=mlm"), {"evaluate", "generate text", "train longer"}),
    "gaps": (("model=nano", "objective=fim"), {"evaluate", "generate text", PLAYGROUND, "train longer"}),
    "pairs": (
        ("task=finetune", "model=nano", "init=scratch"),
        {"evaluate", "generate text", PLAYGROUND, "train longer"},
    ),
    "epochs": (
        ("model=nano", "epochs=2"),
        {"evaluate", "generate text", PLAYGROUND, "fine-tune", "train longer"},
    ),
    "limited time": (
        ("model=nano", "trainer.max_time=00:08:00:00"),
        {"evaluate", "generate text", PLAYGROUND, "fine-tune"},
    ),
    "distill": (
        ("task=distill", "model=nano", "teacher=my teacher"),
        {"evaluate", "generate text", PLAYGROUND, "speculative", "fine-tune", "train longer"},
    ),
    "other tokenizer": (
        ("task=distill", "model=nano", "teacher=my teacher", "loss=uld"),
        {"evaluate", "generate text", PLAYGROUND, "fine-tune", "train longer"},
    ),
}


def check_pasted(command: str) -> None:
    """Parse a command as its program does."""
    _, program, *words = shlex.split(command)
    if program == "train.py":
        checks.check(composed(*words))
    elif program == "evaluate.py":
        parse(words, EvaluateArguments)
    else:
        assert program == "generate.py"
        parse(words, GenerateArguments)


@pytest.fixture
def a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory of a run with a space, in the current folder; teachers have 1024 positions."""
    monkeypatch.chdir(tmp_path)
    Path("a folder").mkdir()
    (tmp_path / "a run" / "hf").mkdir(parents=True)
    monkeypatch.setattr(run_uses, "read_shape", lambda folder: {"n_positions": 1024})
    return tmp_path / "a run"


@pytest.mark.parametrize("kind", RUNS)
def test_next_commands_of_every_kind_of_run_compose(kind: str, a_run: Path) -> None:
    words, expected = RUNS[kind]
    report = {"uses": run_uses.run_uses(prepared(resolved(composed(*words))), a_run)}
    commands = next_commands({**report, **FINISHED}, "a run", has_export=True)
    assert set(commands) == expected
    for command in commands.values():
        check_pasted(command)
    for status in ("stopped", "failed"):
        stopped = next_commands({**report, "status": status}, "a run", has_export=True)
        assert stopped["resume"] == "python train.py resume='a run'"
        assert "train longer" not in stopped
        assert set(next_commands({**report, "status": status}, "a run", has_export=False)) == {"resume"}
    assert "resume" not in next_commands({**report, "status": "pruned"}, "a run", has_export=True)


@pytest.mark.parametrize("kind", ["pretrain", "distill", "masks"])
def test_page_shows_the_next_commands_of_the_terminal(
    kind: str, a_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = prepared(resolved(composed(*RUNS[kind][0])))
    facts = DataFacts("text", "hash", "tokenizer", 300, train_tokens=10, val_tokens=10, val_bytes=10)
    known = next(one.facts for one in build.callbacks(spec, a_run, facts) if isinstance(one, Report))
    write_report(a_run, {**known, **FINISHED})
    run_panels.show_end(spec, FINISHED, a_run)
    commands = commands_of(capsys.readouterr().out)
    assert {name.rstrip(":") for name in commands} == RUNS[kind][1]
    shown = (a_run / "report.html").read_text().partition("<h2>Next</h2>")[2].partition("<h2>")[0]
    assert re.findall("<pre>(.*?)</pre>", shown) == [html.escape(command) for command in commands.values()]


def commands_of(output: str) -> dict[str, str]:
    """Return the next commands that a run has printed."""
    pairs = itertools.pairwise(output.splitlines())
    return {name: command.strip() for name, command in pairs if command.startswith("  python ")}


@pytest.mark.slow
def test_next_commands_work_when_pasted(
    train_here: Train,
    evaluate_here: Command,
    distil: Distil,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Models are evaluated and generate text; trainings are resolved, and one is resumed."""
    longer = ("model.n_positions=256", "callbacks=default", "callbacks.final_score=null")
    answer = distil(*longer, "run_dir=run", without=("model.n_positions",))
    commands = {name.rstrip(":"): command for name, command in commands_of(answer.stdout).items()}
    assert set(commands) == {"evaluate", "generate text", PLAYGROUND, "speculative", "fine-tune", "train longer"}
    generate_here = command_here("generate.py", generate.main, monkeypatch, capfd)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(serve, "serve", lambda arguments: serve._check(arguments))
    words = {name: shlex.split(command)[2:] for name, command in commands.items()}
    assert evaluate_here(*words["evaluate"]).code == 0
    for name in ("generate text", PLAYGROUND):
        assert generate_here(*words[name]).code == 0, name
    assert generate_here(*words["speculative"]).code == 0
    with closing(RunDirectory()) as directory:
        job.resume_or_resolve(composed(*words["fine-tune"]), directory)
    assert train_here(*words["train longer"]).code == 0
    assert json.loads(Path("run/report.json").read_text())["steps"] == 8


def test_facts_are_plain_lines_once_without_a_terminal(train_here: Train, tiny: list[str]) -> None:
    words = [*tiny, "callbacks=default", "callbacks.final_score=null", "callbacks.checkpoint.verify_export=false"]
    answer = train_here(*words, "steps=4", "run_dir=run")
    assert answer.code == 0, answer.stderr
    lines = answer.stdout.splitlines()
    named = [line.split()[0] for line in lines if line.startswith("  ")]
    assert tuple(named[: len(START)]) == START
    assert len([line for line in lines if "val/loss" in line]) == 1
    assert not {"\x1b", "╭", "━"} & set(answer.stdout + answer.stderr)


@pytest.mark.parametrize("columns", [60, 100])
@pytest.mark.slow
def test_run_fits_a_terminal_of_any_width(columns: int, tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, "callbacks=default", "steps=60", "log_every=5", "run_dir=run"]
    variables = {"GPT2LAB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    shown = PseudoTerminal([sys.executable, str(ROOT / "train.py"), *words], columns, tmp_path, **variables)
    assert shown.end() == 0, shown.shown
    bars = [line for line in shown.lines if line.startswith(("train ", "validate ", "prepare ", "export "))]
    assert {line.split()[0] for line in bars} == {"train", "validate", "prepare", "export"}
    assert max(map(len, bars)) <= columns
    boxes = [line for line in shown.lines if line.startswith(("╭", "│", "╰"))]
    assert boxes
    assert {len(line) for line in boxes} == {min(columns, 100)}


@pytest.mark.parametrize(("columns", "has_box"), [(20, False), pytest.param(60, True, marks=pytest.mark.slow)])
def test_narrow_terminal_gets_whole_words_without_a_box(columns: int, has_box: bool) -> None:
    program = "from launch.run.run_panels import _show_panel; _show_panel('title', [('model', '37,120 parameters')])"
    shown = PseudoTerminal([sys.executable, "-c", program], columns, ROOT)
    assert shown.end() == 0, shown.shown
    assert "37,120 parameters" in shown.shown
    assert ("╭" in shown.shown) == has_box


@pytest.mark.slow
def test_long_paths_stay_whole_below_the_box() -> None:
    path = "/a/very/long/folder/of/experiments/that/has/no/space/runs/pretrain/first"
    rows = [("steps", "60 of 8 × 128 tokens"), ("run", path), ("page", "runs/report.html")]
    program = f"from launch.run.run_panels import _show_panel; _show_panel('title', {rows})"
    shown = PseudoTerminal([sys.executable, "-c", program], 60, ROOT)
    assert shown.end() == 0, shown.shown
    assert f"run: {path}" in shown.lines
    boxed = [line for line in shown.lines if line.startswith("│")]
    assert [line.split()[1] for line in boxed] == ["steps", "page"]


@pytest.mark.slow
def test_time_is_estimated_from_an_earlier_run_of_the_same_kind(
    train_here: Train, tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, "callbacks=default", "callbacks.final_score=null", "callbacks.checkpoint.verify_export=false"]
    assert "known after the first steps" in train_here(*words, "steps=4", "name=first").stdout
    file = Path("runs/pretrain/first/report.json")
    phases = {"prepare": 9.0, "train": 8.0, "validate": 1.0, "sample": 2.0, "save": 1.0, "export": 3.0}
    file.write_text(json.dumps({**json.loads(file.read_text()), "seconds_by_phase": phases}))
    longer = train_here(*words, "steps=8", "seed=2", "name=second").stdout
    assert "about 0:23, as in runs/pretrain/first" in longer  # 16 s of training, one validation, sample and save
    for other in ("context=16", "micro_batch=2", "validate_tokens=1000", "profile=1:1"):
        os.utime(file)
        assert "known after the first steps" in train_here(*words, "steps=4", other, f"name={other[0]}").stdout


def test_job_of_a_sweep_prints_one_line_at_its_end(jobs_here: None, train_here: Train, tiny: list[str]) -> None:
    answer = train_here("-m", *tiny, "steps=2", "seed=1,2", "hydra.sweep.dir=sweep")
    lines = answer.stdout.splitlines()
    assert sum(line.startswith("finished: val/loss") for line in lines) == 2
    assert "evaluate:" not in lines


def test_models_of_few_positions_get_texts_that_fit(tmp_path: Path) -> None:
    spec = prepared(resolved(composed("model=nano", "model.n_positions=64", "context=32")))
    commands = run_uses.run_uses(spec, tmp_path)
    assert commands["generate text"] == f"python generate.py checkpoint={tmp_path} max_new_tokens=32"
    assert "max_new_tokens=32" in commands[PLAYGROUND]
    assert "fine-tune" not in commands
