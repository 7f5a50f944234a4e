"""Prompts of generate.py: from the command line, a file, or the lines of standard input."""

import codecs
import io
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpt2lab.errors import InputError
from gpt2lab.storage.utf8 import check_text

FORMS = "Give a text file with a prompt per line, or a .jsonl with `prompt` (or `source`) in each line."


@dataclass(frozen=True)
class Prompt:
    """A prompt, or a source that the prompt template of a fine-tuned model makes into one."""

    text: str
    is_source: bool = False


def given_prompts(prompt: str, source: str, file: str) -> list[Prompt]:
    """Return the prompts of the arguments prompt, source and prompts; empty ones are not given.

    Raises:
        InputError: more than one is given, or the file is unreadable or has an invalid line.
    """
    named = {"prompt": prompt, "source": source, "prompts": file}
    if len(given := [name for name, value in named.items() if value]) > 1:
        raise InputError(f"{' and '.join(given)} are both given.\nGive one of them.")
    if file:
        return _read_file(file)
    return [Prompt(prompt or source, bool(source))] if given else []


def stdin_lines() -> Iterator[str]:
    r"""Yield the lines of a terminal or of standard input, which is UTF-8; only `\n` ends a line.

    A terminal has line editing and a history (arrow keys), and a line that ends with a backslash continues in the next
    one. Its bytes that are not UTF-8 become lone surrogates.

    Raises:
        InputError: a line is no text, elsewhere than in a terminal.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):  # Python can be built without it
            import readline  # noqa: F401 — input() uses it once it is imported
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
        if not is_terminal:
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    for number in itertools.count(1):
        try:
            line = input("> " if is_terminal else "").removesuffix("\r")
            while is_terminal and line.endswith("\\"):
                line = f"{line[:-1]}\n{input('… ')}"
        except EOFError:
            return
        if not is_terminal:
            _check_line(line, f"line {number} of the standard input")
        yield line


def _read_file(file: str) -> list[Prompt]:
    path = Path(file).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"prompts={file} cannot be read: {error}.\n{FORMS}") from error
    text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):  # other line separators are text
        if line.strip():
            place = f"prompts={file}, line {number}"
            line = line.removesuffix("\r")
            _check_line(line, place)
            prompts.append(_from_json(line, place) if path.suffix.lower() == ".jsonl" else Prompt(line))
    if not prompts:
        raise InputError(f"prompts={file} contains no prompt.\n{FORMS}")
    return prompts


def _check_line(line: str, place: str) -> None:
    check_text(line, f"{place}: {line}")
    if "\0" in line:
        raise InputError(f"{place} contains NUL characters: it is UTF-16 or binary.\nGive UTF-8 text.")


def _from_json(line: str, place: str) -> Prompt:
    try:
        record = json.loads(line, strict=False)  # a form feed may be raw
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON: {str(error)[:200]}.\n{FORMS}") from error
    for name in ("prompt", "source"):
        text = record.get(name) if isinstance(record, dict) else None
        if isinstance(text, str):
            check_text(text, f"{place}: {text}")
            return Prompt(text, is_source=name == "source")
    raise InputError(f"{place} has no text in `prompt` or `source`: {line[:80]}\n{FORMS}")
