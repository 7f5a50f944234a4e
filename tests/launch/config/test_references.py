"""References: interpolated arguments follow their key, and no other text is interpolated."""

from typing import Any

import pytest

from launch.config.references import find_references, follow_references

KEYS: dict[str, Any] = {"steps": 300, "run_dir": None, "optimizer.lr": 0.1, "flag": True}


@pytest.mark.parametrize("text", ["${steps}", "${optimizer.lr}", "${run_dir}/best", "${run_dir}-${steps}"])
def test_references_to_keys_are_found_at_any_depth(text: str):
    node = {"samples": {"every": text, "list": [1, {"deep": text}], "other": "steps"}}
    places = {"callbacks.samples.every", "callbacks.samples.list.1.deep"}
    assert find_references(node, "callbacks") == dict.fromkeys(places, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "steps",
        "$steps",
        "${}",
        "${oc.env:HOME}",
        r"\${steps}",
        r"a\b ${steps}",
        "$ ${steps}",
        "${.steps}",
        "${steps",
        "${oc.env:X,${steps}}",
        "${callbacks.samples.every}",
        "${logger.project}",
    ],
)
def test_other_text_is_no_reference(text: str):
    assert find_references({"x": text}, "callbacks") == {}


def test_reference_has_the_type_of_its_key():
    references = {"callbacks.a.b": "${steps}", "callbacks.a.c.1": "${optimizer.lr}", "callbacks.a.d": "x/${steps}"}
    node = {"a": {"b": 1, "c": ["${steps}", 2], "d": "old", "e": "${steps}"}}
    assert follow_references(node, "callbacks", references, KEYS.get) == {
        "a": {"b": 300, "c": ["${steps}", 0.1], "d": "x/300", "e": "${steps}"}
    }


def test_reference_to_an_unset_key_is_resolved_later():
    references = {"logger.save_dir": "${run_dir}/tb", "logger.run_dir": "${run_dir}"}
    node = {"save_dir": "None/tb", "run_dir": None}
    waiting = follow_references(node, "logger", references, KEYS.get)
    assert waiting == {"save_dir": "${run_dir}/tb", "run_dir": None}
    later = follow_references(waiting, "logger", references, {"run_dir": "/a/${steps}"}.get)
    assert later == {"save_dir": "/a/${steps}/tb", "run_dir": "/a/${steps}"}
