"""BoundedCalls: W&B calls that neither raise an error nor take longer than a limit, also when the process ends.

W&B's library waits without a limit for its service process, wandb-core, which in turn waits for the server. A call
that takes too long is abandoned: the service is killed, which ends all that waits for it, and W&B is off.
"""

import atexit
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import psutil
import wandb

log = logging.getLogger(__name__)

SERVICE, THREAD = "wandb-core", "W&B call"
CALL_SECONDS = 30.0  # a call only passes data to the service
EXIT_SECONDS = 10.0  # for the end of a service whose runs are finished
KILLED_SECONDS = 5.0  # for a call to notice that its service was killed

Value = TypeVar("Value")


class BoundedCalls:
    """Calls in a thread each; after the first failure all further calls do nothing.

    Attributes:
        failure: reason why W&B is off; empty while it works.
        is_quiet: whether no warning is logged, where W&B was not requested.
    """

    def __init__(self) -> None:
        self.failure = ""
        self.is_quiet = False

    def call(self, action: Callable[[], Value], otherwise: Value, seconds: float = CALL_SECONDS) -> Value:
        """Return what `action` returns; `otherwise` if W&B is off or the call fails, which logs one warning."""
        if self.failure:
            return otherwise
        if threading.current_thread().name == THREAD:  # W&B's own code calls a bounded method
            return action()
        found: list[Value] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                found.append(action())
            except BaseException as error:  # W&B also raises SystemExit
                errors.append(error)

        thread = threading.Thread(target=work, name=THREAD, daemon=True)
        thread.start()
        thread.join(seconds)
        if found:
            return found[0]
        if not errors:
            ending = threading.Thread(target=end_service, daemon=True)
            ending.start()
            ending.join(KILLED_SECONDS)
            thread.join(KILLED_SECONDS)
            self.fail(f"no response within {seconds:g} seconds")
        else:
            self.fail(first_line(errors[0]))
        return otherwise

    def fail(self, reason: str) -> None:
        """Turn W&B off with a warning."""
        if not self.failure and not self.is_quiet:
            log.warning("W&B is off for the rest of this run: %s", reason)
        self.failure = reason


class ServiceExit:
    """The end of W&B's service at the end of this process; it is killed if it takes longer than `EXIT_SECONDS`.

    W&B's own handler waits for the service without a limit. Ours is registered later, so it runs first, and the thread
    that watches it exists by then, since none can be started at that time.
    """

    def __init__(self) -> None:
        self._exits = threading.Event()
        self._is_registered = False

    def register(self) -> None:
        """Watch the end of this process; called whenever the service may have been started."""
        atexit.unregister(self._end)
        atexit.register(self._end)
        if not self._is_registered:
            self._is_registered = True
            threading.Thread(target=self._watch, name="W&B exit", daemon=True).start()

    def _watch(self) -> None:
        self._exits.wait()
        time.sleep(EXIT_SECONDS)
        kill_service()

    def _end(self) -> None:
        self._exits.set()
        with suppress(Exception, SystemExit):
            wandb.teardown()


SERVICE_EXIT = ServiceExit()


def kill_service() -> None:
    """Kill W&B's service processes that this process has started."""
    for child in psutil.Process().children():
        try:
            if child.name() == SERVICE:
                child.kill()
        except psutil.NoSuchProcess:
            continue


def end_service() -> None:
    """Kill the service, and forget its connection, so that the next run starts another one."""
    kill_service()
    with suppress(Exception, SystemExit):
        wandb.teardown()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return str(error).partition("\n")[0] or type(error).__name__
