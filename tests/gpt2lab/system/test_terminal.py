"""Terminal output: bars on terminals, numbers alone on narrow ones, plain lines elsewhere."""

import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

from gpt2lab.system import terminal
from gpt2lab.system.terminal import Phase, printable
from tests.conftest import ROOT
from tests.support.pseudo_terminal import PseudoTerminal

PROGRAM = """
import sys
from gpt2lab.system.terminal import Phase, show
with Phase("train", 400) as phase:
    phase.numbers = ["loss 4.123", "val 4.512", "12,345 tok/s"]
    for step in range(400):
        phase.advance()
    phase.refresh(at_once=True)
    with Phase("validate", 12) as inner:
        inner.advance(5)
        inner.refresh(at_once=True)
        show("a sample")
        print("a log line", file=sys.stderr)
print("end")
"""


def trained(numbers: list[str]) -> Phase:
    phase = Phase("train", 400)
    phase.done, phase.numbers, phase.remaining = 120, numbers, 112
    return phase


NUMBERS = ["loss 4.123", "val 4.512", "12,345 tok/s"]
WIDTHS = {
    160: f"train  {'━' * 12}{'─' * 28}  120/400  loss 4.123  val 4.512  12,345 tok/s  0:00  ETA 1:52",
    100: f"train  {'━' * 9}{'─' * 22}  120/400  loss 4.123  val 4.512  12,345 tok/s  0:00  ETA 1:52",
    70: "train  120/400  loss 4.123  val 4.512  12,345 tok/s  0:00  ETA 1:52",
    60: "train 120/400 loss 4.123 val 4.512 12,345 tok/s ETA 1:52",
    45: "train 120/400 loss 4.123 val 4.512 ETA 1:52",
    20: "train 120/400 ETA 1…",
}


@pytest.mark.parametrize("width", WIDTHS)
def test_narrow_line_keeps_numbers_and_drops_the_bar(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Phase, "seconds", 0.0)
    line = trained(NUMBERS).line(width)
    line.truncate(width, overflow="ellipsis")
    assert line.plain == WIDTHS[width]
    assert cell_len(line.plain) <= width


def test_eta_of_a_resumed_phase_counts_its_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Phase, "seconds", 10.0)
    phase = Phase("train", 60)
    phase.done = phase.begun_at = 20
    assert "ETA" not in phase.line(100).plain
    phase.done = 25
    assert phase.line(100).plain.endswith("ETA 1:10")


COUNTS = {
    (0, 5, ""): "0/5",
    (1200, 5000, "pairs"): "1,200/5,000 pairs",
    (3_000_000, 12_100_000, "B"): "3.0/12.1 MB",
    (1500, None, "B"): "1.5 kB",
    (7, None, "pairs"): "7 pairs",
    (0, None, ""): "",
}


@pytest.mark.parametrize(("done", "total", "unit"), COUNTS)
def test_work_is_counted_in_its_unit(done: float, total: float | None, unit: str) -> None:
    phase = Phase("prepare", total, unit)
    phase.done = done
    assert phase._count() == COUNTS[done, total, unit]


def test_control_characters_of_a_sample_are_not_sent() -> None:
    assert printable("a\x1b[31m\tb\n\x07é\x9b2J") == "a�[31m\tb\n�é�2J"


def test_phase_without_work_is_not_shown() -> None:
    program = "from gpt2lab.system.terminal import track; print(list(track([], 'load', 0)))"
    shown = PseudoTerminal([sys.executable, "-c", program], 80, ROOT)
    assert (shown.end(), shown.shown) == (0, "[]\r\n")


def in_terminal(columns: int, **variables: str) -> PseudoTerminal:
    shown = PseudoTerminal([sys.executable, "-c", PROGRAM], columns, ROOT, **variables)
    assert shown.end() == 0, shown.shown
    return shown


@pytest.mark.parametrize("columns", [60, 100])
def test_phases_are_lines_of_one_display_below_other_output(columns: int) -> None:
    shown = in_terminal(columns)
    assert shown.widest <= columns
    nested = shown.lines.index(next(line for line in shown.lines if line.startswith("validate")))
    assert shown.lines[nested - 1].startswith("train")
    assert "loss 4.123" in shown.lines[nested - 1]
    assert ("━" in shown.lines[nested - 1]) == (columns == 100)
    assert {"a sample", "a log line", "end"} <= set(shown.lines)
    assert not shown.shown.rpartition("\x1b[?25")[2].startswith("l"), "the cursor is visible"


def test_no_color_moves_the_cursor_and_sets_no_color() -> None:
    assert "\x1b[36m" in in_terminal(100).shown
    assert "\x1b[36m" not in in_terminal(100, NO_COLOR="1").shown


PLAIN: dict[str, dict[str, str]] = {"TERM=dumb": {"TERM": "dumb"}, "rank 1 of torchrun": {"RANK": "1"}}


@pytest.mark.parametrize("kind", PLAIN)
def test_terminal_without_bars_gets_plain_lines(kind: str) -> None:
    assert in_terminal(100, **PLAIN[kind]).shown == "a sample\r\na log line\r\nend\r\n"


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "CLICOLOR_FORCE"])
def test_pipe_receives_no_control_codes(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("a sample\nend\n", "a log line\n")


def test_long_phase_prints_plain_lines_into_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "LINE_SECONDS", -1.0)
    monkeypatch.setattr(Phase, "seconds", 0.0)
    with Phase("teacher cache", 3, "sequences") as phase:
        phase.advance()
        phase.advance(2)
    phase.advance()  # it has ended
    assert capsys.readouterr().err.splitlines() == [
        "teacher cache  1/3 sequences  0:00  ETA 0:00",
        "teacher cache  3/3 sequences  0:00  ETA 0:00",
    ]


def test_terminals_ascii_encoding_gets_an_ascii_bar(tmp_path: Path) -> None:
    program = f"from launch import standard_streams\nstandard_streams.protect()\n{PROGRAM}"
    shown = PseudoTerminal([sys.executable, "-c", program], 100, ROOT, PYTHONIOENCODING="ascii")
    assert shown.end() == 0
    assert any("##" in line and "\\u" not in line for line in shown.lines), shown.lines
