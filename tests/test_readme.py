"""README and docs: every command on them is accepted by train.py, evaluate.py, generate.py or make; links resolve."""

import math
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

import evaluate
import generate
from gpt2lab.data.tokenizer import load_tokenizer
from gpt2lab.model.backbone import Backbone, to_hf
from gpt2lab.reports.hf_folder import write_hf_folder
from gpt2lab.settings import ModelShape, TokenizerChoice
from gpt2lab.storage.report_json import read_report
from launch.checks import checks
from launch.config import run_spec
from launch.config.key_value_cli import parse
from launch.run import build
from tests.conftest import Train
from tests.support.configurations import composed, prepared, resolved
from tests.support.extending import forgetting_plugins, write_examples

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Least number of different commands on all pages. A page with commands in another form lowers the count.
LEAST = {"train.py": 85, "evaluate.py": 15, "generate.py": 12, "make": 12, "-m": 20, "pytest": 4}

FENCE = re.compile(r"\s*(`{3,}|~{3,})")
PYTHON = re.compile(r"(?:\S*/)?python[\d.]*")
VARIABLE = re.compile(r"[A-Z_][A-Z_0-9]*=.*")
# A program at the beginning of a line or after another command, behind a prompt or environment variables.
COMMAND = re.compile(
    r"(?:^|&&|;|\|)\s*(?:\$ )?(?:[A-Z_][A-Z_0-9]*=\S* )*(?:\S*/)?(?:python[\d.]*|make|pytest|torchrun|srun) "
)


def code_of(markdown: str) -> list[str]:
    """Return the lines of fenced and indented blocks, continuation lines joined, and the inline code."""
    blocks, prose, fence = [], [], ""
    for line in markdown.replace("\\\n", " ").splitlines():
        mark = FENCE.match(line)
        if fence:
            fence = "" if mark and line.strip() == fence else fence
            blocks.append(line)
        elif mark:
            fence = mark[1]
        elif line.startswith(("    ", "\t")):
            blocks.append(line)
        else:
            prose.append(line)
    inline = re.findall(r"(?<!`)`([^`]+)`(?!`)", "\n".join(prose))
    return [" ".join(code.split()) for code in [*blocks, *inline]]


def split_commands(line: str) -> list[list[str]]:
    """Return the commands of a line as words, without comments, a prompt `$` and environment variables."""
    if not COMMAND.search(f"{line} "):
        return []
    lexer = shlex.shlex(re.sub(r"(?:^|\s)#.*", "", line), posix=True, punctuation_chars=";&|")
    lexer.whitespace_split, lexer.commenters = True, ""
    found: list[list[str]] = [[]]
    for word in lexer:
        if word and set(word) <= set(";&|"):
            found.append([])
        elif found[-1] or not (word == "$" or VARIABLE.fullmatch(word)):
            found[-1].append(word)
    return [words for words in found if words]


def program_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Return (program, its arguments): an entry script, also under torchrun and srun, a module, make or pytest."""
    if words[0] in ("make", "pytest"):
        return words[0], words[1:]
    if words[1:2] == ["-m"] and PYTHON.fullmatch(words[0]):
        return "-m", words[2:]
    for place, word in enumerate(words):
        if word in ("train.py", "evaluate.py", "generate.py"):
            return word, words[place + 1 :]
    return None


def commands(program: str, texts: list[str] | None = None) -> list[str]:
    """Return the arguments of each different command of this program, as one line each."""
    lines = [line for text in texts or [page.read_text() for page in PAGES] for line in code_of(text)]
    found = [program_of(words) for line in lines for words in split_commands(line)]
    return sorted({shlex.join(each[1]) for each in found if each and each[0] == program})


def test_commands_are_found_in_every_markdown_form() -> None:
    markdown = """
Inline `python train.py seed=1` and, over a line break, `python train.py
seed=2`, but not `train.py seed=0`.

```
python train.py seed=3   # a comment
$ python train.py seed=4 \\
    steps=2
```

~~~bash
# python train.py seed=0
WANDB_MODE=offline python train.py seed=5 && .venv/bin/python train.py seed=6; make demo
~~~

- a list
  ```console
  $ torchrun --nnodes=2 train.py seed=7
  ```

    python train.py seed=8
\tpython train.py 'data=#1'
"""
    seeds = [f"seed={number}" for number in (1, 2, 3, 5, 6, 7, 8)]
    assert commands("train.py", [markdown]) == sorted([*seeds, "seed=4 steps=2", "'data=#1'"])
    assert commands("make", [markdown]) == ["demo"]


@pytest.mark.parametrize("program", LEAST)
def test_the_pages_show_commands_of_each_program(program: str) -> None:
    assert len(commands(program)) >= LEAST[program]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make the files that the pages name."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")  # for hub.push
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "notes").mkdir()
    (tmp_path / "nanoGPT/data/openwebtext").mkdir(parents=True)
    (tmp_path / "notes/a.md").write_text("a")
    (tmp_path / "heldout.txt").write_text("a")
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "reviews.csv").write_text("text,label\na,b\n")
    (tmp_path / "pairs.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "gpt2lab").symlink_to(ROOT / "gpt2lab")
    write_examples(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with forgetting_plugins():
        yield tmp_path


def first_choice(override: str) -> str:
    """Return an override of a sweep with its first value; a list, and a text with commas, is one value."""
    try:
        parsed = OverridesParser.create().parse_overrides([override])[0]
    except OverrideParseException:  # free text
        return override
    if not parsed.is_sweep_override():
        return override
    return f"{parsed.get_key_element()}={next(parsed.sweep_string_iterator())}"


def test_first_job_of_a_sweep_keeps_lists_and_text_whole() -> None:
    given = [
        "model=nano,micro",
        "data.metrics=[exact,rougeL]",
        "optimizer.lr=1e-3,3e-3",
        "seed=range(3,9)",
        "name='a,b'",
    ]
    expected = ["model=nano", "data.metrics=[exact,rougeL]", "optimizer.lr=0.001", "seed=3", "name='a,b'"]
    assert [first_choice(word) for word in given] == expected


@pytest.mark.parametrize("command", commands("train.py"))
def test_a_train_command_of_the_pages_passes_the_checks(command: str, home: Path) -> None:
    words = shlex.split(command)
    if "resume=" in command or "--" in command:
        pytest.skip("resumes or prints; the rest of the command is elsewhere on the page")
    # For a sweep its first job is checked, for a search one at the lower bounds.
    words = [re.sub(r"interval\((.*),.*\)", r"\1", word) for word in words]
    overrides = [word for word in words if word != "-m" and not word.startswith("hparams_search")]
    sweep = "sweep" if "-m" in words else ""
    config = composed(*(map(first_choice, overrides) if sweep else overrides))
    config = replace(config, invocation=replace(config.invocation, sweep=sweep))
    if config.baseline:
        run = home / config.baseline
        run.mkdir(parents=True)
        (run / "report.json").write_text('{"status": "finished", "val_loss": 4.0}')
        run_spec.save(prepared(resolved(replace(config, accelerator="cpu"))), run / "config.yaml")
    checks.check(config)


def test_the_commands_for_gpus_have_a_sequence_for_each_of_eight() -> None:
    section = (ROOT / "README.md").read_text().partition("## GPUs and clusters")[2].partition("\n## ")[0]
    given = commands("train.py", [section])
    assert len(given) >= 4
    for command in given:
        checks.check_batch(composed(*shlex.split(command), "accelerator=gpu", "devices=8"))


@pytest.mark.parametrize("command", [each for each in commands("evaluate.py") if "--help" not in each])
def test_an_evaluate_command_of_the_pages_parses(command: str) -> None:
    parse(shlex.split(command), evaluate.Arguments)


@pytest.mark.parametrize("command", [each for each in commands("generate.py") if "--help" not in each])
def test_a_generate_command_of_the_pages_parses(command: str) -> None:
    parse(shlex.split(command), generate.Arguments)


@pytest.mark.parametrize("target", sorted({command.split()[0] for command in commands("make")}))
def test_a_make_target_of_the_pages_exists(target: str) -> None:
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_modules_and_test_files_of_the_pages_exist() -> None:
    modules = [command.split()[0].replace(".", "/") + ".py" for command in commands("-m")]
    own = [file for file in modules if (ROOT / file.partition("/")[0]).is_dir()]
    tests = [word for command in commands("pytest") for word in command.split() if word.startswith("tests/")]
    assert own
    assert tests
    assert not [file for file in [*own, *tests] if not (ROOT / file).is_file()]


def test_every_group_value_is_listed_on_the_configuration_page() -> None:
    rows = re.findall(r"^\| `(\w+)`[^|]*\| (.*) \|$", (ROOT / "docs/configuration.md").read_text(), flags=re.MULTILINE)
    listed: dict[str, str] = {}
    for group, values in rows:
        listed[group] = listed.get(group, "") + " " + values
    for path in (ROOT / "conf").glob("*/*.yaml"):
        assert re.search(rf"\b{path.stem}\b", listed[path.parent.name]), f"{path.parent.name}={path.stem}"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_has_a_target() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name} → {target}"
            assert not anchor or anchor in anchors(file), f"{page.name} → {target}#{anchor}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_small_is_distilled_from_medium_by_the_pages_command(train_process: Train, tmp_path: Path) -> None:
    """The command as it is written, for 20 steps and little validation; the teacher has random weights."""
    (command,) = [line for line in commands("train.py") if line.startswith("task=distill model=small teacher=runs/")]
    folder = tmp_path / command.rpartition("=")[2] / "hf"
    write_random_teacher(folder)
    short = ("steps=20", "validate_tokens=20000", "callbacks.final_score=null", "run_dir=run")
    answer = train_process(*shlex.split(command), *short)
    assert answer.code == 0, answer.stderr
    report = read_report(tmp_path / "run")
    assert (report["steps"], report["teacher"]["source"]) == (20, str(folder.resolve()))
    assert report["train_loss"] < math.log(VOCABULARY)
    config = run_spec.load(tmp_path / "run" / "config.yaml").config
    assert (config.context, config.optimizer.lr, config.optimizer.weight_decay) == (1024, 6e-4, 0.1)


VOCABULARY = 4096


def write_random_teacher(folder: Path) -> None:
    """Write a GPT-2 medium whose predictions are almost uniform, and so better than a student's at its start."""
    choice = TokenizerChoice("bpe", vocab_size=VOCABULARY)
    spec = resolved(composed("accelerator=cpu", "model=medium"), tokenizer=choice)
    facts = build.data_module(spec).prepare()
    torch.manual_seed(1)
    model = to_hf(Backbone(ModelShape(24, 16, 1024, 1024, VOCABULARY)))
    model.transformer.wte.weight.data.mul_(0.1)
    write_hf_folder(model, load_tokenizer(facts.tokenizer_folder), folder, {})
