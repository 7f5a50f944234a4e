"""key=value arguments: parsed verbatim; an error names the nearest valid key, value or range."""

from dataclasses import dataclass, replace

import pytest

from gpt2lab.errors import InputError
from gpt2lab.keys import key
from gpt2lab.settings import BEAM, NUCLEUS, SAMPLING_PRESETS, SamplingSettings
from launch.config.key_value_cli import describe, group_key, parse

PRESETS = SAMPLING_PRESETS | {"auto": replace(NUCLEUS, top_k=9)}


@dataclass
class Arguments:
    prompt: str = key("text")
    split: str = key("which part", "val", choices=("val", "all"))
    count: int = key("how many", 3, within="[1, inf)")
    top_p: float = key("probability", 0.9, within="[0.01, 1]")
    serve: bool = key("whether to", False)
    sampling: SamplingSettings = group_key("choice of a token", PRESETS)


@pytest.mark.parametrize("text", ["def add(a, b):\n    return a=b", "a,b", "{x: [1, 2]}", "'", "", "=", "${x}", "é 中"])
def test_free_text_arrives_as_it_was_typed(text: str) -> None:
    assert parse([f"prompt={text}"], Arguments).prompt == text


def test_numbers_and_choices_are_typed() -> None:
    assert parse(["prompt=x", "count=7", "top_p=1", "split=all"], Arguments) == Arguments("x", "all", 7, 1.0)


def test_a_group_is_a_preset_with_the_keys_given_in_any_order() -> None:
    assert parse(["prompt=x"], Arguments).sampling == replace(NUCLEUS, top_k=9)
    assert parse(["prompt=x", "sampling.top_p=0.5"], Arguments).sampling == replace(NUCLEUS, top_k=9, top_p=0.5)
    assert parse(["sampling.beams=3", "prompt=x", "sampling=beam"], Arguments).sampling == replace(BEAM, beams=3)


@pytest.mark.parametrize("text", ["true", "True", "TRUE"])
def test_booleans_are_parsed_in_any_case(text: str) -> None:
    assert parse(["prompt=x", f"serve={text}"], Arguments).serve is True
    assert parse(["prompt=x", "serve=False"], Arguments).serve is False
    assert "serve=false" in describe(Arguments)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt=x", "serve=yes"], "serve=yes is not true or false"),
        (["prompt=x", "serve="], "serve= is not true or false"),
        (["promt=x"], "did you mean prompt"),
        (["prompt=x", "split=vall"], "did you mean val"),
        (["prompt=x", "count=three"], "not a whole number"),
        (["prompt=x", "count=1.5"], "not a whole number"),
        (["prompt=x", "count=0"], "at least 1"),
        (["prompt=x", "top_p=nan"], "at least 0.01 and at most 1 and finite"),
        (["prompt=x", "top_p=2"], "top_p=2 is out of range: it must be at least 0.01 and at most 1"),
        (["count=1"], "prompt= is missing"),
        (["prompt=x", "prompt=y"], "twice"),
        (["prompt=x", "top_k=5"], "did you mean sampling.top_k"),
        (["prompt=x", "sampling=nuclus"], "did you mean nucleus"),
        (["prompt=x", "sampling.topk=5"], "did you mean sampling.top_k"),
        (["prompt=x", "sampling.name=beam"], "no key sampling.name"),
        (["prompt=x", "sampling.top_k=1.5"], "sampling.top_k=1.5 is not a whole number"),
        (["prompt=x", "sampling.top_p=0"], "sampling.top_p=0 is out of range: it must be greater than 0 and at most 1"),
        (["prompt=x", "sampling.beams=4"], "Give sampling=beam, or leave it out"),
        (["prompt=x", "sampling=beam", "sampling.temperature=1"], "sampling=beam does not read sampling.temperature"),
        (["prompt=x", "sampling=greedy", "sampling=beam"], "twice"),
        (["prompt"], "not of the form key=value"),
        (["--prompt=x"], "no key --prompt"),
    ],
)
def test_user_error_has_few_lines(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse(words, Arguments)
    assert len(str(caught.value).splitlines()) <= 4


def test_help_names_every_argument() -> None:
    text = describe(Arguments)
    assert all(f"{name}=" in text for name in ("prompt", "split", "count", "top_p", "serve", "sampling.beams"))
