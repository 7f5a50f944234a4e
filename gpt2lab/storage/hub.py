"""Hugging Face Hub: check within seconds whether it is reachable, and repeat requests whose connection breaks."""

import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from gpt2lab.errors import InputError

log = logging.getLogger(__name__)

TIMEOUT = 5.0  # seconds
RETRY_AFTER = (1, 2, 4, 8, 16)  # seconds before each further attempt
BUSY = {408, 429, 500, 502, 503, 504}  # statuses of a server that may answer later

Result = TypeVar("Result")


def is_hub_id(source: str) -> bool:
    """Whether the text is NAME or OWNER/NAME and not a local folder; a missing path such as runs/x is not a Hub id."""
    owner, _, name = source.partition("/")
    looks_like_path = source.startswith((".", "/", "~")) or "/" in name or (bool(name) and Path(owner).is_dir())
    return bool(source) and not looks_like_path and not Path(source).exists()


def hub_id(source: str) -> str | None:
    """Return the Hub id behind a source: itself, or that of a folder in the Hugging Face cache; None for others."""
    if is_hub_id(source):
        return source
    folder = Path(source).parents[1].name if len(Path(source).parents) > 1 else ""  # of models--OWNER--NAME/snapshots/…
    return folder.removeprefix("models--").replace("--", "/") if folder.startswith("models--") else None


@functools.cache
def hub_is_reachable() -> bool:
    """Whether a connection to the Hub (or HF_ENDPOINT) opens within 5 seconds; False if HF_HUB_OFFLINE is set.

    Behind a proxy no connection is tried: the first request shows whether it works.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    address = urlsplit(constants.ENDPOINT)
    if address.scheme in getproxies() or "all" in getproxies():
        return True
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout=TIMEOUT).close()
    except OSError:
        return False
    return True


def require_hub(requested: str, instead: str) -> None:
    """Check that the Hub is reachable.

    With HF_HUB_OFFLINE set nothing is raised: huggingface_hub then reads its cache or fails at once.

    Args:
        requested: what is requested from the Hub, first line of the message.
        instead: what to use instead, second line.

    Raises:
        InputError: no connection.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode() or hub_is_reachable():
        return
    proxy = "" if "https_proxy" in {name.lower() for name in os.environ} else " (behind a proxy, set HTTPS_PROXY)"
    raise InputError(
        f"{requested}: {constants.ENDPOINT} cannot be reached from here{proxy}.\n"
        f"{instead}\n"
        "If it is already in the Hugging Face cache, set HF_HUB_OFFLINE=1 to use that copy."
    )


def retried(what: str, request: Callable[[], Result]) -> Result:
    """Return the result of a request, which is repeated after 1, 2, 4, 8 and 16 seconds if its connection breaks.

    Args:
        what: what is requested, for the log.

    Raises:
        Exception: any other error at once, and that of the last attempt.
    """
    for seconds in RETRY_AFTER:
        try:
            return request()
        except Exception as error:
            if not is_connection_fault(error):
                raise
            reason = str(error).strip().partition("\n")[0][:150] or type(error).__name__
            log.warning("%s: the connection broke (%s); next attempt in %d seconds.", what, reason, seconds)
            time.sleep(seconds)
    return request()


def is_connection_fault(error: BaseException) -> bool:
    """Whether an error, or one that caused it, is a broken connection or a busy server."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if constants.is_offline_mode():
        return False
    for one in error_chain(error):
        if isinstance(one, HfHubHTTPError):
            return one.response.status_code in BUSY
        if isinstance(one, ConnectionError | TimeoutError | HTTPError):
            return True
    return False


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors that caused it, each once."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__
