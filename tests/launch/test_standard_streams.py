"""Standard streams: a program does not fail because of what its terminal can show or because its output is unread."""

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.standard_streams import ASCII_FORMS, READER_GONE
from tests.conftest import ROOT, environment, started

TEXT = "step 4 · val 5.5 ± 0.1 … é 日 \ud800"
HELP = ["train.py", "evaluate.py", "generate.py"]
HELP += [f"-m launch.commands.{path.stem}" for path in sorted((ROOT / "launch" / "commands").glob("[a-z]*.py"))]


def printed(text: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Print a text on both streams as an entry point does, without the imports of a run."""
    program = f"import sys; from launch import exit_codes; text = {text!a}\n"
    program += "exit_codes.run_and_exit(lambda: (print(text), print(text, file=sys.stderr)))"
    plain = {"PYTHONIOENCODING": "", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", **variables}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, **plain}, capture_output=True, timeout=120
    )


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "ascii:strict", "LANG": "C"},
        {"PYTHONIOENCODING": "cp437"},
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONIOENCODING": "iso-8859-1"},
        {"PYTHONIOENCODING": "utf-8"},
    ],
    ids=lambda variables: ",".join(f"{name}={value}" for name, value in variables.items()),
)
def test_text_that_a_terminal_cannot_show_is_replaced(variables: dict[str, str]):
    ended = printed(TEXT, **variables)
    assert ended.returncode == 0, ended.stderr
    encoding = variables.get("PYTHONIOENCODING", "ascii").partition(":")[0]
    for stream in (ended.stdout, ended.stderr):
        line = stream.decode(encoding)
        assert line.startswith(("step 4 | val", "step 4 · val"))
        assert "0.1 ... " in line or "0.1 … " in line
        assert line.endswith("\\ud800\n")


PRINTED = [*(ROOT / "launch").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml")]
PRINTED += [*(ROOT / "gpt2lab").glob("*.py"), *(ROOT / "gpt2lab/system").glob("*.py")]
PRINTED += [*(ROOT / "gpt2lab/analysis").glob("*.py"), *ROOT.glob("*.py")]


@pytest.mark.parametrize("file", PRINTED, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_symbol_of_this_project_has_an_ascii_form(file: Path):
    text = file.read_text()
    strings = [text]
    if file.suffix == ".py":  # without comments
        strings = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    used = {letter for string in strings if isinstance(string, str) for letter in string}
    assert not {letter for letter in used if not letter.isascii()} - set(ASCII_FORMS)
    assert "".join(ASCII_FORMS.values()).isascii()


@pytest.mark.parametrize(("unbuffered", "expected"), [("", (b"", b"one\n")), ("1", (b"one\ntwo", b"one\ntwo"))])
def test_buffering_is_that_of_the_interpreter(unbuffered: str, expected: tuple[bytes, bytes]):
    """By default lines of stderr are written at once; with `python -u`, which torchrun uses, everything is."""
    program = "import os, sys; from launch import exit_codes\n"
    program += "show = lambda: [print('one\\ntwo', end='', file=file) for file in (sys.stdout, sys.stderr)]\n"
    program += "exit_codes.run_and_exit(lambda: (show(), os._exit(0)))"
    variables = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=variables, capture_output=True, timeout=120)
    assert (ended.stdout, ended.stderr[: len(expected[1])]) == expected


@pytest.mark.parametrize("command", HELP)
def test_help_whose_reader_is_gone_ends_with_code_0(command: str):
    """The command is like `train.py --help | head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, *command.split(), "--help"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=120
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_do_not_end_a_program(closed: str, tmp_path: Path):
    program = "import sys; from launch import exit_codes, logging_setup as setup; import logging\n"
    program += (
        "run = lambda: (setup.configure_logging(), logging.getLogger('launch').info('logged'), print('printed'), "
    )
    program += f"sys.stdin.isatty(), open({str(tmp_path / 'done')!r}, 'w').close())\nexit_codes.run_and_exit(run)"
    ended = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -c "$PROGRAM" {closed}'],
        cwd=ROOT,
        timeout=120,
        env={**os.environ, "PROGRAM": program},
        capture_output=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert b"Traceback" not in ended.stderr
    assert (tmp_path / "done").exists()


def test_output_to_a_full_disk_is_an_error_in_a_few_lines():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "train.py", "--help"]
        ended = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: No space left to write")


def test_a_terminal_that_was_closed_has_no_reader():
    """The window of a running program is closed: writes then fail with EIO."""
    assert errno.EIO in READER_GONE
    master, terminal = os.openpty()
    os.close(master)
    program = "from launch import exit_codes; exit_codes.run_and_exit(lambda: [print(n, flush=True) for n in range(3)])"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=terminal, stderr=subprocess.PIPE, timeout=120
    )
    os.close(terminal)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.slow
def test_a_run_trains_scores_and_writes_on_an_ascii_terminal(cache: Path, tmp_path: Path, tiny: list[str]):
    plain = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    keys = [key for key in tiny if not key.startswith("callbacks")]
    process = started(cache, tmp_path, *keys, "steps=4", "sample_every=2", "run_dir=run", **plain)
    assert process.wait(600) == 0, process.communicate()
    for program in (["evaluate.py", "texts=2"], ["generate.py", "prompt=é ·", "max_new_tokens=4"]):
        ended = subprocess.run(
            [sys.executable, str(ROOT / program[0]), "checkpoint=run", *program[1:]],
            cwd=tmp_path,
            env={**environment(cache), **plain},
            capture_output=True,
            timeout=600,
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.isascii()
