"""Hugging Face Hub: check within seconds whether it is reachable, instead of after minutes of retries."""

import functools
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from gpt2lab.errors import InputError

TIMEOUT = 5.0  # seconds


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
