"""The Hugging Face Hub: whether it can be reached, found out in seconds instead of minutes of retries."""

import functools
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from gpt2lab.errors import InputError

SECONDS = 5.0


def is_hub_id(source: str) -> bool:
    """Whether this is NAME or OWNER/NAME and no folder here; a path that leads nowhere, such as runs/x, is none."""
    owner, _, name = source.partition("/")
    looks_like_path = source.startswith((".", "/", "~")) or "/" in name or (bool(name) and Path(owner).is_dir())
    return bool(source) and not looks_like_path and not Path(source).exists()


@functools.cache
def hub_is_reachable() -> bool:
    """Whether a connection to the Hub (or HF_ENDPOINT) opens within seconds; False when HF_HUB_OFFLINE is set.

    Behind a proxy no connection is tried: the proxy's answer comes with the first request.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    address = urlsplit(constants.ENDPOINT)
    if address.scheme in getproxies() or "all" in getproxies():
        return True
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout=SECONDS).close()
    except OSError:
        return False
    return True


def require_hub(wanted: str, instead: str) -> None:
    """Raise an InputError that names what was wanted from the Hub and what to use instead, unless it can be reached.

    With HF_HUB_OFFLINE set nothing is raised: then the library answers from its own cache or refuses at once.

    Raises:
        InputError: no connection.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode() or hub_is_reachable():
        return
    proxy = "" if "https_proxy" in {name.lower() for name in os.environ} else " (behind a proxy, set HTTPS_PROXY)"
    raise InputError(
        f"{wanted}: {constants.ENDPOINT} cannot be reached from here{proxy}.\n"
        f"{instead}\n"
        "If an earlier download lies in the Hugging Face cache, HF_HUB_OFFLINE=1 uses it."
    )
