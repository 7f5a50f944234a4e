"""Playground site: the page and its one question, over HTTP. One text is written at a time, a few requests wait.

GET  /             the page: one file, nothing from outside
GET  /facts.json   models, settings and their ranges
POST /write        {"prompt": "…", "temperature": 0.8, …} → a line of JSON for each thing that happens
"""

import asyncio
import json
import threading
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from gpt2lab.errors import InputError
from launch.generate.playground import Asked, Event, Playground

PAGE = Path(__file__).with_name("playground.html")
WAITING = 4  # requests beside the one that is being answered
LARGEST_REQUEST = 2**16  # bytes
ENDED = "The playground was ended in its terminal."
FAILED = "Something went wrong that should not; the terminal of the playground says what. You can go on."
OWN_NAMES = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Stopped(Exception):
    """Nobody waits for the text any more."""


class Site:
    """What is answered to whom, in which order."""

    def __init__(self, playground: Playground) -> None:
        self.playground = playground
        self._writer = ThreadPoolExecutor(1)  # one thread: one text at a time, in the order of asking
        self._asking = 0
        self._ending = threading.Event()

    def app(self) -> web.Application:
        """The site as aiohttp runs it."""
        app = web.Application(client_max_size=LARGEST_REQUEST, middlewares=[_in_words])
        routes = [web.get("/", self._page), web.get("/facts.json", self._facts), web.post("/write", self._write)]
        app.add_routes(routes)
        return app

    def end(self) -> None:
        """Stop the text that is being written, at its next token."""
        self._ending.set()
        self._writer.shutdown(wait=False, cancel_futures=True)

    async def _page(self, request: web.Request) -> web.Response:
        return web.Response(text=PAGE.read_text(encoding="utf-8"), content_type="text/html", headers=HEADERS)

    async def _facts(self, request: web.Request) -> web.Response:
        return web.json_response(self.playground.facts(), headers=HEADERS)

    async def _write(self, request: web.Request) -> web.StreamResponse:
        if request.content_type != "application/json":  # the one kind that another site's page may not send here
            return _refusal("Send JSON, with Content-Type: application/json.", 415)
        asked = self.playground.read(await request.read())
        if self._ending.is_set():
            return _refusal(ENDED, 503)
        if self._asking > WAITING:
            return _refusal(f"{WAITING} requests are waiting already. Try again in a moment.", 503)
        response = web.StreamResponse(headers={**HEADERS, "Content-Type": "application/x-ndjson"})
        self._asking += 1
        try:
            await response.prepare(request)
            async with aclosing(self._events(asked)) as events:
                async for event in events:
                    await response.write(json.dumps(event).encode() + b"\n")
        except ConnectionError:
            pass  # the page was closed
        finally:
            self._asking -= 1
        return response

    async def _events(self, asked: Asked) -> AsyncGenerator[Event, None]:
        """What happens while the text is written in the writer's thread, which stops when this is left."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | None]()
        unwanted = threading.Event()

        def tell(event: Event) -> None:
            if unwanted.is_set() or self._ending.is_set():
                raise Stopped
            loop.call_soon_threadsafe(events.put_nowait, event)

        if self._asking > 1:
            yield {"waiting": self._asking - 1}
        writing = loop.run_in_executor(self._writer, self.playground.write, asked, tell)
        writing.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            error = None if writing.cancelled() else writing.exception()
            if writing.cancelled() or isinstance(error, Stopped):
                yield {"error": ENDED}
            elif error is not None:
                traceback.print_exception(error)
                yield {"error": FAILED}
        finally:
            unwanted.set()
            writing.cancel()


@web.middleware
async def _in_words(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuses other sites' pages (their Origin) and names that lead here (their Host); tells mistakes in JSON."""
    try:
        if not all(_is_own(place) for place in (f"//{request.host}", request.headers.get("Origin")) if place):
            return _refusal("This page is for this machine alone. Open it as http://127.0.0.1 with its port.", 403)
        return await handler(request)
    except InputError as mistake:
        return _refusal(str(mistake), 400)
    except web.HTTPRequestEntityTooLarge:
        return _refusal(f"The prompt is too long: a request may have {LARGEST_REQUEST:,} bytes. Shorten it.", 413)
    except web.HTTPException as refused:
        return _refusal(f"{refused.reason}.", refused.status)
    except Exception as error:  # a mistake of ours ends one request, never the server
        traceback.print_exception(error)
        return _refusal(FAILED, 500)


def _is_own(place: str) -> bool:
    try:
        return urlsplit(place).hostname in OWN_NAMES
    except ValueError:
        return False


def _refusal(message: str, status: int) -> web.Response:
    return web.json_response({"error": message}, status=status, headers=HEADERS)
