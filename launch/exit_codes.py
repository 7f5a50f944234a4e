"""Exit codes: runs an entry point, prints a user error in a few lines on stderr, and returns the exit code.

0 finished · 1 an error, or a sweep with a failed job · 2 invalid configuration or input · 75 stopped by a signal after
saving, can be resumed · 130 Ctrl-C.
"""

import atexit
import errno
import importlib.util
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
from gpt2lab.system.out_of_memory import out_of_memory_reason
from launch import home_folder, standard_streams
from launch.rank_environment import ignore_foreign_variables, is_spawned_rank

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
FINISHED, FAILED, USER_ERROR, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
PACKAGES = ("hydra", "lightning", "torch", "transformers")  # imported by every program
ERROR_FILE = "error.txt"  # message of a failed job, for the sweep that started it


class Exit(SystemExit):
    """Request to end the program early, without a traceback.

    Args:
        code: the exit code.
        message: text for stderr; nothing is printed when it is empty.
    """

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(code)
        self.message = message

    def __str__(self) -> str:
        return self.message


def exit_on_early_signal() -> None:
    """Exit on a signal from now on, without a traceback; for a program's first lines, as its imports take seconds."""
    for number in SIGNALS:
        signal.signal(number, _exit_at_once)


def exit_without_packages() -> None:
    """Exit with a short message if this Python lacks the packages, as in a shell where .venv is not activated."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: {sys.executable} has no package {', '.join(missing)}.\n"
            "Activate the environment: source .venv/bin/activate (make setup creates it).",
            file=sys.stderr,
        )
        sys.exit(USER_ERROR)


def run_and_exit(entry: Callable[[], Any]) -> NoReturn:
    """Run `entry` and exit with its exit code, also when Ctrl-C arrives while the interpreter shuts down."""
    standard_streams.protect()
    atexit.register(_ignore_signals)
    exit_on_early_signal()
    sys.exit(exit_code(entry))


def exit_code(entry: Callable[[], Any]) -> int:
    """Run `entry` and return its exit code."""
    ignore_foreign_variables()
    warn_once.cache_clear()
    with handle_signals(_exit_at_once):
        try:
            home_folder.substitute_unwritable()
            entry()
            sys.stdout.flush()  # an error of this, such as a full disk, has an exit code too
        except Exit as request:
            if request.message:
                print(request.message, file=sys.stderr)
            return int(request.code or FINISHED)
        except Exception as error:
            return _print_error(error)
    return FINISHED


@contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGINT, SIGTERM and SIGUSR1 by `handler` in the block, and as before after it."""
    previous = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


def signal_exit_code(number: int) -> int:
    """Exit code of a run that saved and stopped after this signal."""
    return INTERRUPTED if number == signal.SIGINT else STOPPED


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print an error of the block and raise `Exit` with its code, before Hydra catches the error and prints its own."""
    try:
        yield
    except Exception as error:
        raise Exit(_print_error(error)) from None


def _print_error(error: Exception) -> int:
    """Print the error, with a traceback only if it is neither a user error nor a RunError; return the exit code."""
    input_error = as_input_error(error)
    if input_error is None and not isinstance(error, RunError):
        traceback.print_exception(error)
    else:
        print(f"error: {input_error or error}", file=sys.stderr)
    return FAILED if input_error is None else USER_ERROR


def as_input_error(error: Exception) -> InputError | None:
    """Convert an error that the user can fix, such as a full disk or a Hydra error; None for all other errors."""
    if isinstance(error, InputError):
        return error
    if full := full_disk_message(error):
        return InputError(f"{full}\nFree some space, or set run_dir=, cache_dir= or TMPDIR to another disk.")
    if memory := out_of_memory_reason(error):
        return InputError(
            f"Out of memory: {memory}.\nUse a smaller model, context or max_new_tokens, or precision=bf16."
        )
    if isinstance(error, UnicodeEncodeError) and error.encoding == "utf-8":  # from a file name in the data
        text = error.object[max(error.start - 60, 0) : error.end + 60].encode("utf-8", "backslashreplace").decode()
        return InputError(f"This file name is not valid UTF-8: {text!r}\nRename the file.")
    if isinstance(error, FileNotFoundError) and not _has_working_directory():
        return InputError("The working directory no longer exists.\nChange to another one: cd FOLDER")
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # of Path.expanduser
        return InputError("A path begins with ~, but that user has no home directory.\nWrite out the path.")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return InputError(f"The name of this file or folder is too long: {error.filename}\nShorten it.")
    if isinstance(error, OSError) and error.errno in UNWRITABLE and error.filename:
        notes = vars(error).get("__notes__", [])  # the newest checkpoint of the run
        hint = "Change its permissions, or give another path."
        return InputError("\n".join([f"{error.strerror}: {error.filename}", hint, *notes]))
    if isinstance(error, pickle.UnpicklingError):
        from gpt2lab.storage.tensor_file import unreadable_message

        return InputError(unreadable_message("A file to be loaded", error))
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, HydraException | OmegaConfBaseException):
        from launch.config.hydra_errors import to_input_error

        return to_input_error(error)
    return None


def _has_working_directory() -> bool:
    try:
        os.getcwd()  # noqa: PTH109 — Path.cwd() of a deleted folder raises another error
    except FileNotFoundError:
        return False
    return True


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Raise `Exit` on a signal in the block, so that the caller can remove files it has created."""

    def raise_exit(number: int, _frame: FrameType | None) -> None:
        if not _is_failing(number):
            raise Exit(signal_exit_code(number), stop_message(number))

    with handle_signals(raise_exit):
        yield


def _ignore_signals() -> None:
    """Ignore signals at the very end of shutdown: atexit runs last what was registered first."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _exit_at_once(number: int, _frame: FrameType | None) -> None:
    """Exit without an exception, which some packages swallow at import; no run directory exists yet to clean up."""
    if _is_failing(number):
        return
    if not is_spawned_rank():  # a rank's parent process prints the cause
        has_echo = number == signal.SIGINT and sys.stderr.isatty()  # ^C, behind which the message would begin
        os.write(sys.stderr.fileno(), b"\n" * has_echo + f"{stop_message(number)}\n".encode())
    os._exit(signal_exit_code(number))


def _is_failing(number: int) -> bool:
    """Whether this process is already handling an error, whose message and exit code take precedence over a signal.

    PyTorch sends SIGTERM to the remaining ranks after one has failed; they may be failing with a lost connection.
    """
    return number != signal.SIGINT and sys.exception() is not None


def stop_message(number: int) -> str:
    """Return the message after a signal that left nothing to resume."""
    return f"Stopped by {signal.Signals(number).name}."
