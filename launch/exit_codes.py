"""Answer: turns how an entry point ended into an exit code, and a user's mistake into a few lines on stderr.

0 finished · 1 an error, or a sweep in which a job failed · 2 a mistake in the configuration or the input · 75 stopped
by a signal after saving, to be resumed · 130 Ctrl-C.
"""

import atexit
import errno
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from gpt2lab.errors import InputError, RunError
from gpt2lab.storage.atomic_files import full_disk_message
from gpt2lab.storage.damaged_files import warn_once
from launch.rank_environment import ignore_foreign_variables, is_started_rank

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
FINISHED, FAILED, MISTAKE, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130


class Ended(SystemExit):
    """The run ended early in an orderly way; `code` is the exit code, `message` goes to stderr."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(code)
        self.message = message


def end(entry: Callable[[], Any]) -> NoReturn:
    """Run `entry` and end this process as it ended; a Ctrl-C while the interpreter shuts down has an exit code too."""
    atexit.register(_ignore_signals)
    for number in SIGNALS:
        signal.signal(number, _end_at_once)
    sys.exit(exit_code(entry))


def exit_code(entry: Callable[[], Any]) -> int:
    """Run `entry` and return its exit code."""
    ignore_foreign_variables()
    previous = {number: signal.signal(number, _end_at_once) for number in SIGNALS}
    warn_once.cache_clear()
    try:
        entry()
    except Ended as ended:
        if ended.message:
            print(ended.message, file=sys.stderr)
        return int(ended.code or FINISHED)
    except Exception as error:
        return _answer_to(error)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return FINISHED


def code_of_signal(number: int) -> int:
    """Exit code of a run that this signal stopped in good order."""
    return INTERRUPTED if number == signal.SIGINT else STOPPED


@contextmanager
def ending_in_a_code() -> Iterator[None]:
    """Errors of the block end the program with their code; Hydra would first print a line of its own."""
    try:
        yield
    except Exception as error:
        raise Ended(_answer_to(error)) from None


def _answer_to(error: Exception) -> int:
    mistake = as_mistake(error)
    if mistake is None and not isinstance(error, RunError):
        traceback.print_exception(error)
    else:
        print(f"error: {mistake or error}", file=sys.stderr)
    return FAILED if mistake is None else MISTAKE


def as_mistake(error: Exception) -> InputError | None:
    """The InputError that this error amounts to, if it is the user's to mend."""
    if isinstance(error, InputError):
        return error
    if full := full_disk_message(error):
        return InputError(f"{full}\nFree some space, or set run_dir= and cache_dir= to another disk.")
    if isinstance(error, UnicodeEncodeError) and error.encoding == "utf-8":  # a file's name, which no check can foresee
        text = error.object[max(error.start - 60, 0) : error.end + 60].encode("utf-8", "backslashreplace").decode()
        return InputError(f"This is not valid UTF-8, in which all files here are written: {text!r}\nRename the file.")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return InputError(f"The name of this file or folder is too long: {error.filename}\nGive a shorter one.")
    if isinstance(error, pickle.UnpicklingError):
        from gpt2lab.storage.tensor_file import refusal

        return InputError(refusal("A file that was to be loaded", error))
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, HydraException | OmegaConfBaseException):
        from launch.config.hydra_errors import explained

        return explained(error)
    return None


@contextmanager
def cleaning_up() -> Iterator[None]:
    """In the block a signal raises `Ended`, so that what was made can be removed again."""

    def end(number: int, _frame: FrameType | None) -> None:
        if not _ends_by_itself(number):
            raise Ended(code_of_signal(number), _message_of(number))

    previous = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ignore_signals() -> None:
    """The last of what runs at exit, for it is registered first; next Python gives signals back to the system."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_at_once(number: int, _frame: FrameType | None) -> None:
    """Until a run directory is made nothing needs cleaning up, and an exception amid imports is garbled by some."""
    if _ends_by_itself(number):
        return
    if not is_started_rank():  # else its parent names the signal, or the rank whose death ends the others
        os.write(sys.stderr.fileno(), f"{_message_of(number)}\n".encode())
    os._exit(code_of_signal(number))


def _ends_by_itself(number: int) -> bool:
    """Whether an error is being handled, which ends this process with its own message and exit code.

    Where one of several ranks fails, PyTorch sends SIGTERM to the others, which fail for lack of it.
    """
    return number != signal.SIGINT and sys.exception() is not None


def _message_of(number: int) -> str:
    return f"Stopped by {signal.Signals(number).name}."
