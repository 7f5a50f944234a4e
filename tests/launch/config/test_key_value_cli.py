"""key=value arguments: taken verbatim, and a mistake names the nearest valid key, value or range."""

from dataclasses import dataclass

import pytest

from gpt2lab.errors import InputError
from gpt2lab.keys import key
from launch.config.key_value_cli import describe, parse


@dataclass
class Arguments:
    prompt: str = key("text")
    split: str = key("which part", "val", choices=("val", "all"))
    count: int = key("how many", 3, within="[1, inf)")
    top_p: float = key("probability", 0.9, within="[0.01, 1]")
    serve: bool = key("whether to", False)


@pytest.mark.parametrize("text", ["def add(a, b):\n    return a=b", "a,b", "{x: [1, 2]}", "'", "", "=", "${x}", "é 中"])
def test_free_text_arrives_as_it_was_typed(text: str) -> None:
    assert parse([f"prompt={text}"], Arguments).prompt == text


def test_numbers_and_choices_are_typed() -> None:
    assert parse(["prompt=x", "count=7", "top_p=1", "split=all"], Arguments) == Arguments("x", "all", 7, 1.0)


@pytest.mark.parametrize("text", ["true", "True", "TRUE"])
def test_true_and_false_are_yes_and_no_in_any_case(text: str) -> None:
    assert parse(["prompt=x", f"serve={text}"], Arguments).serve is True
    assert parse(["prompt=x", "serve=False"], Arguments).serve is False
    assert "serve=false" in describe(Arguments)


@pytest.mark.parametrize(
    ("words", "told"),
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
        (["prompt"], "not of the form key=value"),
        (["--prompt=x"], "no key --prompt"),
    ],
)
def test_a_mistake_is_told_in_few_lines(words: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        parse(words, Arguments)
    assert len(str(caught.value).splitlines()) <= 4


def test_help_names_every_argument() -> None:
    text = describe(Arguments)
    assert all(f"{name}=" in text for name in ("prompt", "split", "count", "top_p", "serve"))
