"""Literal text: any path or prompt is stored, read back and recorded in commands unchanged; UTF-8 is required."""

import math
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import yaml

import evaluate
import generate
from gpt2lab.analysis import optuna_storage
from gpt2lab.storage.report_json import read_report
from launch import exit_codes
from launch.commands import consolidate
from launch.config import literal_text, run_spec
from launch.config.run_spec import PreparedSpec
from launch.config.schema import Invocation, RunConfig
from tests.conftest import Answer, Train
from tests.support.configurations import composed

TEXTS = (
    *("", " ", " a ", "\t", "a\nb\n", "\r\n", "a\x85b\u2028c\u2029", "\ufeff", "\x07", "é😀", "\u00a0"),
    *("$", "$HOME", "${", "${x}", "${oc.env:HOME}", "${now:%Y}", "\\${x}", "\\\\${x}", "a\\", "a\\\\", "}{", "{a: b}"),
    *(
        "'",
        '"',
        "''",
        "it's",
        "\\'",
        "'\\",
        "a'b\"c`d",
        "`ls`",
        "$(ls)",
        "!x",
        "#",
        "a #b",
        "*.md",
        "~",
        "~/x",
        "&",
        "|",
    ),
    *(
        "null",
        "Null",
        "true",
        "no",
        "1e3",
        "1e-05",
        "0x1f",
        "1_000",
        "12:30:00",
        "2020-01-01",
        ".inf",
        "nan",
        "<<",
        "=",
    ),
    *("[a,b]", "a,b", "a=b", "a: b", "- a", "(x)", "choice(a,b)", "%", "@", "!!python/name:os.system", "---", "?"),
    '/data/${oc.env:X}/$it\'s {odd}, "quoted"\n\\${now:}\\',
)
KEYS = ("path", "val_path", "source", "target", "init", "teacher", "baseline", "resume", "run_dir", "name", "cache_dir")
FLOATS = (1e-05, 1e-300, 0.1 + 0.2, 3e-4, 1e22, 123456789.123456789, math.inf, -0.0)


def without_words(config: RunConfig) -> RunConfig:
    return replace(config, invocation=replace(config.invocation, command="", overrides=[]))


@pytest.mark.parametrize("text", TEXTS)
def test_a_stored_configuration_reads_back_equal(text: str):
    config = composed("data=pairs")
    samples = {**config.callbacks["samples"], "prompts": [text, {"nested": text}]}
    config = replace(
        config,
        path=text,
        run_dir=text,
        init=text,
        callbacks={**config.callbacks, "samples": samples},
        data={**config.data, "text": text},
        launcher=replace(config.launcher, partition=text, setup=[text], sbatch={"a": text}),
        invocation=Invocation({**config.invocation.groups, "data": text}, [f"path={text}", text], text),
    )
    assert run_spec.from_yaml(RunConfig, run_spec.to_yaml(config), "here") == config


@pytest.mark.parametrize("number", FLOATS)
def test_a_stored_number_reads_back_to_the_last_bit(number: float):
    config = composed("data=pairs")
    optimizer, task = replace(config.optimizer, lr=number), {**config.task, "x": [number, str(number)]}
    stored = run_spec.to_yaml(replace(config, optimizer=optimizer, task=task))
    read = run_spec.from_yaml(RunConfig, stored, "here")
    assert (repr(read.optimizer.lr), repr(read.task["x"])) == (repr(number), repr([number, str(number)]))


def in_turns(texts: list[str]) -> list[dict[str, str]]:
    """Yield overrides that give every text to one of the text keys, many at a time, because composing is slow."""
    return [dict(zip(KEYS, texts[start:], strict=False)) for start in range(0, len(texts), len(KEYS))]


def test_recorded_command_composes_the_same_config():
    for values in in_turns([text for text in TEXTS if text != "null"]):
        prompts = literal_text.override("callbacks.samples.prompts", [*values.values(), "null"])
        first = composed(*(literal_text.override(key, text) for key, text in values.items()), prompts)
        assert {key: vars(first)[key] for key in values} == values
        assert first.callbacks["samples"]["prompts"] == [*values.values(), "null"]
        again = composed(*shlex.split(first.invocation.command)[2:])
        assert without_words(again) == without_words(first)


def test_free_text_is_the_value_as_typed():
    """Exceptions are interpolations, null and quotes around the whole text."""
    plain = [text for text in TEXTS if "${" not in text and text not in ("null", "''")]
    for values in in_turns(plain):
        settings = composed(*(f"{key}={text}" for key, text in values.items()))
        assert {key: vars(settings)[key] for key in values} == values


def test_a_shell_reads_a_recorded_command_as_it_was():
    words = [literal_text.override("source", text) for text in TEXTS]
    shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {shlex.join(words)}"], capture_output=True, check=True)
    assert shown.stdout.decode().split("\0")[:-1] == words


@pytest.mark.parametrize("name", ["a?b=c", "a%41b", "{SCHEMA_VERSION}", "o${dd}'s {x}\n$y"])
def test_search_folder_may_have_any_name(name: str, tmp_path: Path):
    file = tmp_path / name / "study.db"
    file.parent.mkdir()
    optuna_storage.make_study(file, True, optuna.samplers.RandomSampler(), {"pruner": {"name": "none"}})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    assert optuna_storage.load_study(file) is not None


def scored(words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Answer:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    capfd.readouterr()
    return Answer(exit_codes.exit_code(evaluate.main), *capfd.readouterr())


def test_run_with_interpolations_resumes_in_another_shell(
    train_here: Train,
    tiny: list[str],
    tmp_path: Path,
    sources: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    odd = tmp_path / "o${dd}'s {x}\n$y"
    shutil.copytree(sources, odd / "text")
    keys = [key for key in tiny if not key.startswith("path=")]
    monkeypatch.setenv("ODD", str(odd))
    ended = train_here(*keys, "path=${oc.env:ODD}/text", "run_dir=run-${now:%Y}", "steps=1")
    assert ended.code == 0, ended.stderr
    monkeypatch.delenv("ODD")
    (run,) = tmp_path.glob("run-2*")
    stored = run_spec.load(run / "config.yaml").config
    assert stored.path == f"{odd}/text"
    assert stored.invocation.command == read_report(run)["command"]
    again = composed(*shlex.split(stored.invocation.command)[2:])
    assert (again.path, again.run_dir) == (stored.path, run.name)
    ended = train_here(f"resume={run}", "steps=2")
    assert ended.code == 0, ended.stderr
    assert scored([f"checkpoint={run}"], monkeypatch, capfd).code == 0
    sizes = [key for key in keys if not key.startswith(("model.", "vocab_size"))]
    ended = train_here(*sizes, f"path={sources}", "model=auto", f"init={run}", "steps=1", "run_dir=new")
    assert ended.code == 0, ended.stderr


@pytest.mark.slow
def test_sweep_jobs_have_the_text_that_was_given(
    train_here: Train, tiny: list[str], tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
):
    odd = tmp_path / "o${dd}'s {x}\n$y"
    shutil.copytree(sources, odd / "text")
    monkeypatch.setenv("ODD", str(odd))
    keys = [*(key for key in tiny if not key.startswith("path=")), "path=${oc.env:ODD}/text", "steps=1"]
    keys.append("accelerator=cpu")
    for more in ([], ["resume=auto", "launcher=slurm", "launcher.executor=local"]):
        ended = train_here("-m", *keys, "seed=1,2", "hydra.sweep.dir=swept", *more)
        assert ended.code == 0, ended.stdout + ended.stderr
        shutil.rmtree(tmp_path / "swept" / "1")
    stored = run_spec.load(tmp_path / "swept" / "0" / "config.yaml").config
    assert stored.path == f"{odd}/text"
    monkeypatch.delenv("ODD")
    assert composed(*shlex.split(stored.invocation.command)[2:]).path == stored.path


PATHS = {
    "train": ["path", "val_path", "run_dir", "name", "cache_dir", "init", "teacher", "baseline", "resume", "source"],
    "evaluate": [
        "checkpoint",
        "teacher",
        "baseline",
        "path",
        "val_path",
        "cache_dir",
        "tokenizer",
        "json",
        "csv",
        "plot",
    ],
    "generate": ["checkpoint", "prompt", "prompts", "draft", "json", "inspect_file"],
}
COMMANDS = {"evaluate": evaluate.main, "generate": generate.main}
COMMANDS["consolidate"] = lambda: consolidate._program(sys.argv[1:])


@pytest.fixture
def refused(train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run a command that must be refused before it writes anything."""

    def run(command: str, *words: str, value: str) -> None:
        before = sorted(tmp_path.iterdir())
        if command == "train":
            ended = train_here(*words)
        else:
            monkeypatch.setattr(sys, "argv", [f"{command}.py", *words])
            capfd.readouterr()
            ended = Answer(exit_codes.exit_code(COMMANDS[command]), *capfd.readouterr())
        assert ended.code == 2, ended.stderr
        assert f"{value} is not valid UTF-8" in ended.stderr
        assert len(ended.stderr.strip().splitlines()) == 2
        assert sorted(tmp_path.iterdir()) == before

    return run


@pytest.mark.parametrize("command", PATHS)
def test_an_argument_that_is_not_utf8_is_refused(command: str, refused):
    value = os.fsdecode(b"a/x\xff")
    for key in PATHS[command]:
        refused(command, f"{key}={value}", value=f"{key}=a/x\\xff")


def test_folders_that_are_not_utf8_are_refused(
    refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: list[str]
):
    odd = tmp_path / os.fsdecode(b"od\xffd")
    odd.mkdir()
    refused("consolidate", str(odd), value=f"{tmp_path}/od\\xffd")
    refused("train", "-m", "seed=1,2", f"hydra.sweep.dir={odd}", value=f"hydra.sweep.dir={tmp_path}/od\\xffd")
    monkeypatch.setenv("ODD", str(odd))
    refused("train", *tiny, "path=${oc.env:ODD}", value=f"path={tmp_path}/od\\xffd")
    refused("train", "callbacks=default", "callbacks.samples.prompts=[a,'${oc.env:ODD}']", value="od\\xffd")
    (tmp_path / "link").symlink_to(odd)
    (odd / "config.json").write_text('{"model_type": "gpt2"}')
    (odd / "model.safetensors").write_bytes(b"")
    refused("train", *tiny, f"init={tmp_path / 'link'}", value="od\\xffd")
    for name in ("GPT2LAB_CACHE", "HOME"):
        with monkeypatch.context() as patch:
            patch.setenv(name, str(odd))
            refused("train", *tiny, value=f"The environment variable {name}={tmp_path}/od\\xffd")
    monkeypatch.chdir(odd)
    for command in ("train", *COMMANDS):
        refused(command, value=f"The working directory {tmp_path}/od\\xffd")


def test_a_stored_configuration_of_another_kind_is_refused():
    for text in ("", "[1]", "!!python/object/apply:os.system [x]", "a: [", "{a: 1}", 'task: "\\ud800"', "\x00"):
        with pytest.raises(exit_codes.InputError):
            run_spec.from_yaml(PreparedSpec, text, "here")
    assert yaml.safe_load(literal_text.to_yaml({"a": "b"})) == {"a": "b"}


def test_a_list_among_stored_texts_is_refused():
    stored = yaml.safe_load(run_spec.to_yaml(composed("data=pairs")))
    invocation: dict[str, object] = {"overrides": [{"a": 1}], "references": {"a": {"b": "c"}}, "groups": {"a": ["b"]}}
    for changed in (
        {"plugins": [["a"]]},
        {"launcher": {**stored["launcher"], "setup": [["a"]]}},
        {"study": {**stored["study"], "lr_factors": [[1.0]]}},
        *({"invocation": {**stored["invocation"], key: value}} for key, value in invocation.items()),
    ):
        with pytest.raises(exit_codes.InputError, match=r"Cannot read the configuration here: .* is not of type"):
            run_spec.from_yaml(RunConfig, yaml.safe_dump({**stored, **changed}), "here")
