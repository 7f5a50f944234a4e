"""Standard streams of a process: output that cannot be shown or has no reader does not end the program.

Characters that the encoding lacks are replaced; once the reader is gone, output is discarded. A closed stream is
opened on the null device.
"""

import codecs
import errno
import io
import os
import sys
from typing import Any

READER_GONE = (errno.EPIPE, errno.EIO)  # a closed pipe, as in `python train.py | head`; a terminal that was closed
ASCII_FORMS = {"·": "|", "…": "...", "±": "+/-", "−": "-", "–": "-", "—": "-", "×": "x", "─": "-", "→": "->"}
ASCII_FORMS |= {"≤": "<=", "≥": ">=", "≈": "~", "█": "#", "━": "#", "²": "^2"}
ASCII_FORMS |= {"‖": "||", "←": "<-", "↑": "^", "↓": "v", "½": "1/2", "¼": "1/4", "÷": "/", "’": "'", "\xa0": " "}
ASCII_FORMS |= {"α": "alpha", "β": "beta", "λ": "lambda", "Σ": "sum", "�": "?", "│": "|", **dict.fromkeys("╭╮╰╯", "+")}
PROTECTED = "ascii-forms"  # name of the error handler


class _Descriptor(io.FileIO):
    """File descriptor that is redirected to the null device after an error, which is raised if a reader is left."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # else the same error occurs again when the process ends
            os.close(null)
            if error.errno not in READER_GONE:
                raise
            return len(data)


def protect() -> None:
    """Replace `sys.stdout` and `sys.stderr` by protected streams, and closed standard streams by the null device."""
    codecs.register_error(PROTECTED, replace_unencodable)
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115 — closed with the process
    sys.stdout, sys.stderr = _protected(sys.stdout), _protected(sys.stderr)


def replace_unencodable(error: UnicodeError) -> tuple[str, int]:
    r"""Error handler of a codec: an ASCII form of this project's symbols, `\xe9` and the like of other characters."""
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    forms = (ASCII_FORMS.get(letter) or letter.encode("ascii", "backslashreplace").decode() for letter in letters)
    return "".join(forms), error.end


def _protected(stream: Any) -> Any:
    """The same stream, protected; a stream of another kind, such as a notebook's, is returned unchanged."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123
    if type(stream) is not io.TextIOWrapper:
        return stream
    stream.flush()
    descriptor = _Descriptor(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        descriptor if stream.write_through else io.BufferedWriter(descriptor),  # write_through: `python -u`
        encoding=stream.encoding,
        errors=stream.errors if stream.errors in ("replace", "ignore", "xmlcharrefreplace") else PROTECTED,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
