"""Server of the playground: listens on localhost until Ctrl-C or another signal."""

import asyncio
import errno
import socket
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, NoReturn

from gpt2lab.errors import InputError
from gpt2lab.settings import OBJECTIVES
from gpt2lab.storage.model_folder import read_objective, resolve_model_folder
from launch.exit_codes import SIGNALS, Exit, signal_exit_code
from launch.generate.generator import Arguments, TextGenerator

if TYPE_CHECKING:
    from launch.generate.playground import Playground

HOST = "127.0.0.1"  # localhost only, because there is no password
UNSUPPORTED = ("prompts", "json", "num_samples", "stop", "inspect")  # arguments that the page does not support


def serve(arguments: Arguments) -> NoReturn:
    """Serve the page until a signal.

    Raises:
        InputError: an argument is not supported, the port is not available, aiohttp is not installed, or the model
            cannot be loaded.
        Exit: after a signal, with its exit code.
    """
    _check(arguments)
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise InputError(
            "serve=true needs aiohttp, which is not installed here.\n"
            f"Install it: {sys.executable} -m pip install -c requirements.txt aiohttp"
        ) from None
    with _listen(arguments.port) as listener:
        generator = TextGenerator(arguments)
        from launch.generate.playground import Playground  # after TextGenerator has silenced the libraries

        playground = Playground(generator)
        playground.warm_up()
        number = asyncio.run(_serve_until_signal(playground, listener))
    raise Exit(signal_exit_code(number), "The playground has ended.")


async def _serve_until_signal(playground: "Playground", listener: socket.socket) -> int:
    """Handle requests; return the number of the signal that ended the server."""
    from aiohttp import web

    from launch.generate.playground_server import Site

    stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def stop(number: int) -> None:
        if not stopped.done():
            stopped.set_result(number)

    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    site = Site(playground)
    runner = web.AppRunner(site.app(), handler_cancellation=True, access_log=None, shutdown_timeout=2)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    print(f"Open http://{HOST}:{listener.getsockname()[1]} in a browser on this machine. Ctrl-C ends.", flush=True)
    try:
        return await stopped
    finally:
        site.stop()
        await runner.cleanup()


def _check(arguments: Arguments) -> None:
    defaults = {argument.name: argument.default for argument in fields(Arguments)}
    unsupported = [f"{name}=" for name in UNSUPPORTED if vars(arguments)[name] != defaults[name]]
    unsupported += ["sampling=beam"] if arguments.sampling.beams > 1 else []
    if unsupported:
        raise InputError(
            f"serve=true reads prompts from the page and generates one text each.\nLeave out {', '.join(unsupported)}."
        )
    objective = read_objective(resolve_model_folder(arguments.checkpoint, "checkpoint"))
    if OBJECTIVES[objective].fills_masks:
        raise InputError(
            "serve=true supports left-to-right models only, and this one was trained with objective=mlm.\n"
            "Leave serve=true out, and give prompt= with <|mask|>."
        )


def _listen(port: int) -> socket.socket:
    """Open a socket on localhost; before the model is loaded, which takes seconds.

    Raises:
        InputError: the port is in use or reserved.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # reuse a port in TIME_WAIT
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            reason = "is in use by another program"
        elif error.errno == errno.EACCES:
            reason = "needs root permission"
        else:
            raise
        raise InputError(f"port={port} {reason}.\nGive another one, or port=0 for any free port.") from None
    return listener
