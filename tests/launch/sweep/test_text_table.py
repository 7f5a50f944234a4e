"""Tables and sentences of sweeps and studies on a terminal: whole words within its width."""

import pytest

from launch.sweep.text_table import aligned, wrapped

LINES = [("folder", "status", "value", "overrides"), ("0", "finished", "4.5031", "lr=0.0012 weight_decay=0.2")]
TABLES = {
    None: ["folder  status    value   overrides", "0       finished  4.5031  lr=0.0012 weight_decay=0.2"],
    60: ["folder  status    value   overrides", "0       finished  4.5031  lr=0.0012 weight_decay=0.2"],
    40: ["folder  status    value", "    overrides", "0       finished  4.5031", "    lr=0.0012 weight_decay=0.2"],
    20: [
        "folder  status",
        "    value  overrides",
        "0       finished",
        "    4.5031",
        "      lr=0.0012",
        "      weight_decay=0.2",
    ],
}


@pytest.mark.parametrize("width", TABLES)
def test_cells_that_do_not_fit_continue_on_the_next_line(width: int | None) -> None:
    assert aligned(LINES, width).splitlines() == TABLES[width]


TEXTS = {
    "words": ("Best seen: lr=0.008 of all", 14, ["Best seen:", "  lr=0.008 of", "  all"]),
    "indented": ("  lr=1 − lr=2: 0.1 nats", 14, ["  lr=1 − lr=2:", "    0.1 nats"]),
    "a path": ("see /a/long/path/of/a/run.html", 10, ["see", "  /a/long/path/of/a/run.html"]),
    "a pipe": ("one line of a pipe", None, ["one line of a pipe"]),
    "lines": ("a\n\nb", 10, ["a", "", "b"]),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_sentences_are_wrapped_at_words(kind: str) -> None:
    text, width, expected = TEXTS[kind]
    assert wrapped(text, width).splitlines() == expected
