"""A key is declared once: default in conf/, meaning in its field; help, reference and checks derive from both."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from docs import build_reference
from gpt2lab.errors import InputError
from gpt2lab.keys import METADATA, Key, keys_of
from gpt2lab.settings import CrossEntropySettings, TrainingSettings
from launch.config.groups import CONF, default_of, default_values, group_of, groups, keys_set_by, plain_defaults, values
from launch.config.help_lines import format_value
from launch.config.help_text import EMPTY, heading, help_text, keys_of_group
from launch.config.key_value_cli import describe
from launch.config.known_keys import NODES, PLACES, HubKeys, known_keys
from launch.config.plain_keys import SECTIONS
from launch.config.schema import RunConfig
from launch.config.unused_keys import CONDITIONS
from launch.evaluate.score_checkpoints import Arguments as EvaluateArguments
from launch.generate.generator import Arguments as GenerateArguments
from tests.conftest import ROOT, Train

LONGEST_TEXT = 100  # characters
PRESETS = [(group, value) for group in groups() for value in values(group)]
PLAIN_KEYS = [name for section in SECTIONS for name in section.__annotations__]
GROUP_KEYS = [name for group in groups() for name in keys_of_group(group)]
COMMAND_LINES = {"evaluate.py": EvaluateArguments, "generate.py": GenerateArguments}
ARGUMENTS = [(program, *item) for program, kind in COMMAND_LINES.items() for item in keys_of(kind)]
COMMENTED = ("experiment", "callbacks", "logger")  # groups that have comments beside keys in their files
NEUTRAL = ("", None, [])  # Python default of an optional key
READ_BEFORE = ("kind", "default_tokenizer", "languages")  # keys of data that are no argument of its class


def field_defaults(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, Python default) of every field that has one, those of nested dataclasses included."""
    hints = get_type_hints(kind)
    for item in fields(kind):
        if is_dataclass(hints[item.name]) and METADATA in item.metadata:
            yield from field_defaults(hints[item.name], f"{prefix}{item.name}.")
        elif item.default is not MISSING:
            yield f"{prefix}{item.name}", item.default
        elif item.default_factory is not MISSING and METADATA in item.metadata:
            yield f"{prefix}{item.name}", item.default_factory()


def signature_defaults() -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, Python default) of the classes that a node is built from."""
    for place, kinds in PLACES.items():
        for target, kind in kinds.items() if place != "trainer" else ():
            module, _, name = target.rpartition(".")
            parameters = inspect.signature(vars(import_module(module))[name]).parameters
            keys = [item.name for item in fields(kind) if item.name not in READ_BEFORE]
            assert set(keys) <= set(parameters), target
            yield from ((f"{place}.{one}", parameters[one].default) for one in keys)


# Presets of sampling are compared in tests/launch/run/test_sampling.py
PYTHON_DEFAULTS = [pair for pair in field_defaults(RunConfig, "") if not pair[0].startswith("sampling.")]
PYTHON_DEFAULTS += [
    pair for place, kinds in PLACES.items() for kind in kinds.values() for pair in field_defaults(kind, f"{place}.")
]
PYTHON_DEFAULTS += [pair for pair in signature_defaults() if pair[1] is not inspect.Parameter.empty]


def defaults_in_conf(name: str) -> dict[str, Any]:
    """Return {value of the key's group that reads it: default there, MISSING where it has none}."""
    group = group_of(name)
    reading_group, _, readers = known_keys()[name].read_by.partition("=")
    reading = readers.split(",") if readers and reading_group == group else values(group)
    return {value: _plain(keys_set_by(group, value).get(name, MISSING)) for value in reading}


def _plain(value: Any) -> Any:
    """Convert 1e-3, which YAML 1.1 reads as text, and replace ${key} by the default of that plain key."""
    if not isinstance(value, str):
        return value
    if reference := re.fullmatch(r"\$\{(\w+)\}", value):
        return plain_defaults()[reference[1]]
    return float(value) if re.fullmatch(r"\d+e-?\d+", value) else value


def test_every_key_of_conf_has_a_field() -> None:
    named = {name for preset in PRESETS for name in keys_set_by(*preset) if not name.endswith("_target_")}
    assert not named - set(known_keys())
    assert set(plain_defaults()) == set(PLAIN_KEYS)
    assert {item.name for item in fields(RunConfig)} == {*PLAIN_KEYS, *groups(), "study", "invocation"} - {"experiment"}


@pytest.mark.parametrize("name", GROUP_KEYS)
def test_every_field_of_a_group_has_its_default_in_conf(name: str) -> None:
    """A typed group has it in each value that reads the key; a node in the values with a class that takes it."""
    found = defaults_in_conf(name)
    assert any(default is not MISSING for default in found.values())
    group, reader = name.split(".")[0], known_keys()[name].read_by.partition("=")[0]
    if group not in (*PLACES, "callbacks") and reader in ("", group):
        assert not [value for value, default in found.items() if default is MISSING]


@pytest.mark.parametrize("preset", values("data"))
def test_pairs_may_come_from_a_data_set(preset: str) -> None:
    """`data=classify data.dataset=ORG/NAME` needs no `+`."""
    found = keys_set_by("data", preset)
    if found["data.kind"] == "pairs":
        assert {f"data.{item.name}" for item in fields(HubKeys)} <= set(found)


@pytest.mark.parametrize(("name", "default"), PYTHON_DEFAULTS, ids=[name for name, _ in PYTHON_DEFAULTS])
def test_a_default_in_python_is_that_of_conf(name: str, default: Any) -> None:
    """Code that builds settings without a command line has the defaults of conf/."""
    assert default in NEUTRAL or default in list(defaults_in_conf(name).values())


@pytest.mark.parametrize("target", [target for target in NODES if not target.startswith("lightning.")])
def test_a_class_has_no_other_default_for_a_plain_key(target: str) -> None:
    module, _, name = target.rpartition(".")
    parameters = inspect.signature(vars(import_module(module))[name]).parameters.values()
    given = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
    _assert_plain_defaults(given)


def test_training_settings_have_no_other_default_for_a_plain_key() -> None:
    for kind in (TrainingSettings, CrossEntropySettings):
        _assert_plain_defaults({item.name: item.default for item in fields(kind) if item.default is not MISSING})


def _assert_plain_defaults(given: dict[str, Any]) -> None:
    """Check defaults; a false one (0, "") means a value that is not given."""
    for name in set(given) & set(plain_defaults()):
        assert not given[name] or given[name] == plain_defaults()[name], name


@pytest.mark.parametrize(
    ("program", "name", "meaning"), [("train.py", *item) for item in known_keys().items()] + ARGUMENTS
)
def test_a_text_is_one_short_line(program: str, name: str, meaning: Key) -> None:
    text = meaning.text
    assert text == text.strip()
    assert 0 < len(text) <= LONGEST_TEXT, len(text)
    assert not text.endswith(".")
    assert "\n" not in text


def test_docs_list_the_keys_that_a_resumed_run_may_change() -> None:
    text = (ROOT / "docs" / "runs.md").read_text()
    assert [name for name, meaning in known_keys().items() if meaning.on_resume and f"`{name}`" not in text] == []


def test_no_key_is_described_twice() -> None:
    """Neither two fields nor a comment in conf/ describe a key again; comments of recipes give reasons for values."""
    by_name: dict[str, Key] = {}
    for place, kinds in PLACES.items():
        for name, meaning in (item for kind in kinds.values() for item in keys_of(kind, f"{place}.")):
            assert by_name.setdefault(name, meaning) is meaning, name
    texts = [meaning.text for meaning in {id(one): one for one in known_keys().values()}.values()]
    assert len(texts) == len(set(texts)), {text for text in texts if texts.count(text) > 1}
    for group, value in PRESETS:
        lines = (CONF / group / f"{value}.yaml").read_text().splitlines()
        head = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
        beside = [line for line in lines[head:] if re.search(r"(^|\s)#", line)]
        assert group in COMMENTED or not beside, f"conf/{group}/{value}.yaml"


def test_sections_of_the_schema_equal_those_of_train_yaml() -> None:
    text = (CONF / "train.yaml").read_text()
    for section in SECTIONS:
        keys = "".join(rf"{name}: .*\n" for name in section.__annotations__)
        assert re.search(rf"^# {heading(section)}\n{keys}\n", text, flags=re.MULTILINE), heading(section)


@pytest.mark.parametrize("group", [group for group in groups() if f"{group}.name" in known_keys() and group != "data"])
def test_choices_of_a_name_are_the_values_of_the_group(group: str) -> None:
    choices = known_keys()[f"{group}.name"].choices
    assert not choices or set(choices) == set(values(group))


@pytest.mark.parametrize("name", [name for name, meaning in known_keys().items() if meaning.read_by])
def test_reader_of_every_key_exists(name: str) -> None:
    reader = known_keys()[name].read_by
    group, _, readers = reader.partition("=")
    allowed = (
        keys_set_by("callbacks", "default") if group == "callbacks" else values(group) if group in groups() else ()
    )
    named = {one.split(".")[1] for one in allowed} if group == "callbacks" else set(allowed)
    assert reader in CONDITIONS or set(readers.split(",")) <= named


@pytest.mark.parametrize("program", COMMAND_LINES)
def test_every_argument_is_a_key_in_the_help(program: str) -> None:
    kind = COMMAND_LINES[program]
    assert all(METADATA in item.metadata for item in fields(kind))
    described = describe(kind)
    assert all(f"  {item.name}=" in described for item in fields(kind))


@pytest.mark.parametrize("name", ["accelerator", "cache_dir", "path", "val_path", "source", "target", "allow_targets"])
def test_an_argument_of_evaluate_is_the_key_of_train(name: str) -> None:
    assert dict(keys_of(EvaluateArguments))[name] is known_keys()[name]


@pytest.mark.parametrize("width", [60, 100])
def test_help_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for text in [help_text(["--help"]), *(help_text(["--help", group]) for group in groups())]:
        assert max(map(len, text.splitlines())) <= width
    for kind in COMMAND_LINES.values():
        assert max(map(len, describe(kind).splitlines())) <= width


def test_help_names_every_group_value_and_plain_key(train_here: Train) -> None:
    answer = train_here("--help")
    assert answer.code == 0
    assert all(word in answer.stdout for group, value in PRESETS for word in (group, value))
    assert all(f"  {name}={format_value(default)}" in answer.stdout for name, default in plain_defaults().items())


def test_help_on_a_group_has_its_values_and_defaults() -> None:
    text = help_text(["--help", "optimizer"])
    assert all(f"optimizer={value}" in text for value in values("optimizer"))
    assert "optimizer.lr=auto" in text
    assert "optimizer.beta2=0.999" in help_text(["--help", "optimizer=adam"])
    assert "optimizer.beta2=0.999" in help_text(["optimizer=adam", "--help", "optimizer"])


@pytest.mark.parametrize("name", [*PLAIN_KEYS, *GROUP_KEYS])
def test_help_on_a_key_has_its_text_and_default(name: str) -> None:
    text = " ".join(help_text(["--help", name]).split())
    assert text.startswith(f"{name}: {known_keys()[name].text}")
    default = format_value(default_of(name, default_values()))
    assert f"{name}={default}".strip() in text or f"{default or EMPTY} (" in text


def test_help_lists_defaults_that_the_chosen_value_lacks() -> None:
    text = " ".join(help_text(["--help", "sampling.temperature"]).split())
    assert "Default: 0.0 (beam, greedy), 0.9 (nucleus), 0.8 (top_k)" in text
    text = " ".join(help_text(["--help", "sampling"]).split())
    assert "sampling.temperature= softmax temperature; 0: greedy; default 0.0 (beam, greedy), 0.9 (nucleus)" in text
    assert "sampling.beams=4" in text
    assert "Default: sampling.temperature=0.8" in help_text(["sampling=top_k", "--help", "sampling.temperature"])


def test_help_on_an_unknown_name_suggests_one(train_here: Train) -> None:
    with pytest.raises(InputError, match=re.escape("no such group or key (did you mean steps?)")):
        help_text(["--help", "stpes"])
    answer = train_here("--help", "optimizer=adamm")
    assert answer.code == 2
    assert "did you mean adam" in answer.stderr


def test_the_reference_has_every_key() -> None:
    page = build_reference.page()
    assert all(f"| `{name}` | " in page for name in (*PLAIN_KEYS, *GROUP_KEYS))
    assert page == Path(build_reference.PAGE).read_text(), "run: make docs"
