"""README and docs: the commands are run with a tiny model and a few steps, but for those that are composed only.

`COMPOSED_ONLY` is the convention that docs/README.md states: what needs more than this machine. tests/test_readme.py
composes and checks every command.
"""

import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SHRUNK, Answer, Command, Train, command_here, environment
from tests.support.extending import forgetting_plugins, write_examples
from tests.test_readme import PAGES, ROOT, commands, first_choice

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# Reasons for which a command is composed and checked, but not run.
COMPOSED_ONLY = {
    "a data set or model of the Hub": r"=gpt2\b|fineweb|=hub\b|=xsum|\.dataset=|lm_eval=|lambada|_owt|_dolly|_presets",
    "GPUs, several devices or a cluster": r"accelerator=gpu|devices=|launcher=|model=(small|medium|xl)|/big",
    "a login, or a server that stays": r"serve=true|dashboards",
    "a run, sweep or study made earlier": r"resume=|THE SAME|sweeps/|runs/demo-|runs/translate|/translate|draft",
    "a search or study of many runs": r"hparams_search=|experiment=distill_study",
    "a file or package of yours": r"nanoGPT/|mypkg|my_conf",
    "output of a moment": r"--help|--version|--cfg",
}
MODEL = [key for key in SHRUNK if key.startswith("model.")]
USUAL = [key for key in SHRUNK if not key.startswith("model.")]
SHORT = ["steps=2", "validate_every=2", "checkpoint_every=2", "schedule.warmup_steps=1", "run_dir=run"]
TEXT_OF_PAIRS = ["task.text.examples=2", "task.text.max_new_tokens=4"]
LEFT_OUT = ("name", "n_jobs")  # a run of that name exists; one job
# Keys that another key of the command rules out.
RULED_OUT = {
    "val_path": ("val_fraction",),
    "logger.": ("logger",),
    "sampling": ("callbacks",),
    "epochs": ("steps",),
    "trainer.fast_dev_run": ("schedule.warmup_steps",),
}
SMALLER = {"epochs": "epochs=1", "profile": "profile=1:1", "task.frozen_layers": "task.frozen_layers=1"}


def measurements_left_out(program: str) -> list[str]:
    """Return the commands of a program on all pages but those of measurements, which state their own date."""
    return commands(
        program, [page.read_text() for page in PAGES if page.parent.name not in ("measurements", "tutorials")]
    )


def runnable(program: str) -> list[str]:
    return [
        one for one in measurements_left_out(program) if not any(re.search(why, one) for why in COMPOSED_ONLY.values())
    ]


def tiny_words(command: str, sources: Path) -> list[str]:
    """Return the words of a command with a tiny model, little text and two steps; of a sweep its first job."""
    words = [first_choice(word) for word in shlex.split(command) if word != "-m"]
    words = [SMALLER.get(name_of(word), word) for word in words if name_of(word) not in LEFT_OUT]
    pairs = bool(re.search(r"task=finetune|data=(summarize|pairs|classify|translate)", command))
    added = [*SHORT, *(["batch_sequences=4", "context=32", "precision=fp32"] if pairs else USUAL)]
    if pairs:
        added += ["callbacks=minimal", "logger=none", *(TEXT_OF_PAIRS if "task=finetune" in words else [])]
    if "task=finetune" not in words and "model=auto" not in words:
        added += MODEL
    if "task=distill" in words:
        added += ["preflight=off", "teacher=runs/pretrain/teacher"]
    if "sequences=" in command:
        added.append("sequences.max_new_tokens=8")
    if not re.search(r"\bpath=|data=(stdlib|classify|translate)", command):
        added.append(f"path={sources}")
    ruled_out = {key for given, keys in RULED_OUT.items() for word in words if word.startswith(given) for key in keys}
    short = {name_of(word) for word in SHORT}
    words = [word for word in words if name_of(word) not in short]
    given_names = {name_of(word) for word in words} | ruled_out
    return [*words, *(word for word in added if name_of(word) not in given_names)]


def name_of(word: str) -> str:
    """Return the key of an override."""
    return word.partition("=")[0]


@pytest.fixture(scope="session")
def sources(whole_sources: Path) -> Path:
    """Whole files, whose functions make pairs."""
    return whole_sources


@pytest.fixture(scope="session")
def stored_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the runs that the pages name, which the first test makes."""
    return tmp_path_factory.mktemp("stored_runs")


@pytest.fixture
def at_home(
    train_here: Train, tmp_path: Path, sources: Path, stored_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The files and runs that the pages name, in the working directory."""
    for folder in ("notes", "sweeps"):
        (tmp_path / folder).mkdir()
    text = (sources / "textwrap.py").read_text()
    for name in ("notes/a.md", "notes.txt", "heldout.txt"):
        (tmp_path / name).write_text(text)
    (tmp_path / "reviews.csv").write_text("text,label\n" + "".join(f"good {n},yes\nbad {n},no\n" for n in range(40)))
    (tmp_path / "pairs.jsonl").write_text(
        "".join(f'{{"question": "{n} + 1", "answer": "{n + 1}"}}\n' for n in range(80))
    )
    (tmp_path / "prompts.txt").write_text("import os\ndef add(\n")
    (tmp_path / "sources.jsonl").write_text('{"source": "def add(a, b): ..."}\n')
    write_examples(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    if not (stored_runs / "runs").exists():
        make_runs(train_here, sources)
        shutil.copytree(tmp_path / "runs", stored_runs / "runs")
    else:
        shutil.copytree(stored_runs / "runs", tmp_path / "runs")
    for name, run in (
        ("RUN", "pretrain/teacher"),
        ("TEACHER_RUN", "pretrain/teacher"),
        ("STUDENT_RUN", "distill/student"),
        ("runs/pretrain/first", "pretrain/teacher"),
        ("runs/pretrain/notes", "pretrain/teacher"),
    ):
        shutil.copytree(tmp_path / "runs" / run, tmp_path / name)
    shutil.copytree(tmp_path / "runs/finetune/summary", tmp_path / "runs/finetune/RUN")
    shutil.move(tmp_path / "runs/RUN_OF_FIM", tmp_path / "RUN_OF_FIM")
    with forgetting_plugins():
        yield tmp_path


def make_runs(train_here: Train, sources: Path) -> None:
    """Make the runs that the pages name."""
    text = [*SHRUNK, f"path={sources}", "steps=2", "schedule.warmup_steps=1"]
    for words in (
        [*text, "run_dir=runs/pretrain/teacher"],
        [*text, "run_dir=runs/pretrain/scratch", "seed=2"],
        [*text, "run_dir=runs/pretrain/masked", "objective=mlm"],
        [*text, "run_dir=runs/RUN_OF_FIM", "objective=fim"],
        [*text, "run_dir=runs/distill/student", "task=distill", "teacher=runs/pretrain/teacher", "preflight=off"],
        [
            *("task=finetune", "data=summarize", f"path={sources}", "init=runs/distill/student", "context=32"),
            *("precision=fp32", "callbacks=minimal", "logger=none", "steps=2", "run_dir=runs/finetune/summary"),
            *("batch_sequences=4", *TEXT_OF_PAIRS),
        ],
    ):
        ended = train_here(*words)
        assert ended.code == 0, ended.stderr


@pytest.mark.parametrize("command", runnable("train.py"))
def test_a_train_command_of_the_pages_runs(command: str, train_here: Train, at_home: Path, sources: Path) -> None:
    ended = train_here(*tiny_words(command, sources))
    assert ended.code == 0, ended.stderr


@pytest.mark.parametrize("command", runnable("evaluate.py"))
def test_an_evaluate_command_of_the_pages_runs(command: str, evaluate_here: Command, at_home: Path) -> None:
    ended = evaluate_here(*(re.sub(r"^(texts|decode)=\d+", r"\1=4", word) for word in shlex.split(command)))
    assert ended.code == 0, ended.stderr


@pytest.mark.parametrize("command", runnable("generate.py"))
def test_a_generate_command_of_the_pages_runs(
    command: str, at_home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import generate

    monkeypatch.setattr(sys, "stdin", io.StringIO("import os\n"))  # of a command without a prompt
    run: Callable[..., Answer] = command_here("generate.py", generate.main, monkeypatch, capfd)
    ended = run(*shlex.split(command), "max_new_tokens=4")
    assert ended.code == 0, ended.stderr


@pytest.mark.parametrize("command", [each for each in runnable("-m") if each.startswith("launch.commands")])
def test_a_module_of_the_pages_runs(command: str, at_home: Path, cache: Path) -> None:
    words = [sys.executable, "-m", *shlex.split(command)]
    inherited = {**environment(cache), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(words, cwd=at_home, env=inherited, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_the_convention_of_what_runs_is_on_the_front_page() -> None:
    page = (ROOT / "docs/README.md").read_text()
    assert all(reason in page for reason in COMPOSED_ONLY)
