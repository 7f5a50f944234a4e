"""Serving: opens the playground on this machine alone, and ends it at Ctrl-C."""

import asyncio
import errno
import socket
import sys
from typing import TYPE_CHECKING, NoReturn

from gpt2lab.errors import InputError
from gpt2lab.settings import OBJECTIVES
from gpt2lab.storage.model_folder import folder_of, read_objective
from launch.exit_codes import SIGNALS, Ended, code_of_signal
from launch.generate.generator import Arguments, Author

if TYPE_CHECKING:
    from launch.generate.playground import Playground

HOST = "127.0.0.1"  # nobody else's: there is no password
NOT_SERVED = {
    "prompts": "",
    "json": "",
    "num_samples": 1,
    "beams": 1,
    "stop": "",
    "inspect": False,
}


def serve(arguments: Arguments) -> NoReturn:
    """Serve the page until a signal comes.

    Raises:
        InputError: arguments that the page does not know, a port that cannot be had, no aiohttp, or what Author raises.
        Ended: by the signal, with its exit code.
    """
    _check(arguments)
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise InputError(
            "serve=true needs aiohttp, which is not installed here.\n"
            f"Install it: {sys.executable} -m pip install -c requirements.txt aiohttp"
        ) from None
    with _listening(arguments.port) as listener:
        author = Author(arguments)
        from launch.generate.playground import Playground  # imports what Author has by now told to be quiet

        playground = Playground(author)
        playground.warm_up()
        number = asyncio.run(_until_a_signal(playground, listener))
    raise Ended(code_of_signal(number), "The playground has ended.")


async def _until_a_signal(playground: "Playground", listener: socket.socket) -> int:
    """Answer requests; returns the number of the signal that ended it."""
    from aiohttp import web

    from launch.generate.playground_server import Site

    ending: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def end(number: int) -> None:
        if not ending.done():
            ending.set_result(number)

    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, end, number)
    site = Site(playground)
    runner = web.AppRunner(site.app(), handler_cancellation=True, access_log=None, shutdown_timeout=2)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    print(f"Open http://{HOST}:{listener.getsockname()[1]} in a browser on this machine. Ctrl-C ends.", flush=True)
    try:
        return await ending
    finally:
        site.end()
        await runner.cleanup()


def _check(arguments: Arguments) -> None:
    unknown = [name for name, usual in NOT_SERVED.items() if vars(arguments)[name] != usual]
    if unknown:
        raise InputError(
            f"The page takes its prompts itself, and writes one text of each.\nLeave out {_list(unknown)}."
        )
    objective = read_objective(folder_of(arguments.checkpoint, "checkpoint"))
    if OBJECTIVES[objective].fills_masks:
        raise InputError(
            "serve=true shows models that write from left to right, and this one was trained with objective=mlm.\n"
            "Leave serve=true out, and give prompt= with <|mask|>."
        )


def _list(names: list[str]) -> str:
    return ", ".join(f"{name}=" for name in names)


def _listening(port: int) -> socket.socket:
    """A socket that listens on this machine alone; taken before the model is loaded, which takes seconds."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left is free
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            why = "is in use by another program"
        elif error.errno == errno.EACCES:
            why = "is not for ordinary users"
        else:
            raise
        raise InputError(f"port={port} {why}.\nGive another one, or port=0 for any that is free.") from None
    return listener
