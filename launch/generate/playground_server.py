"""Playground server: HTTP routes of the page; one text is generated at a time, a few requests wait.

GET  /             the page: one file without external resources
GET  /facts.json   models, settings and their ranges
POST /write        {"prompt": "…", "temperature": 0.8, …} → events, one JSON object per line
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
from launch.generate.playground import Event, GenerationRequest, Playground

PAGE = Path(__file__).with_name("playground.html")
MAX_WAITING = 4  # waiting requests, besides the active one
MAX_REQUEST_BYTES = 2**16
STOPPED = "The playground was stopped in its terminal."
FAILED = "Internal error; the terminal of the playground shows the traceback. You can try again."
LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Cancelled(Exception):
    """The page was closed, or the server stops."""


class Site:
    """Request handlers of the playground."""

    def __init__(self, playground: Playground) -> None:
        self.playground = playground
        self._writer = ThreadPoolExecutor(1)  # one thread: one text at a time, in the order of requests
        self._active = 0
        self._stopping = threading.Event()

    def app(self) -> web.Application:
        """Create the aiohttp application."""
        app = web.Application(client_max_size=MAX_REQUEST_BYTES, middlewares=[_handle_errors])
        routes = [web.get("/", self._page), web.get("/facts.json", self._facts), web.post("/write", self._write)]
        app.add_routes(routes)
        return app

    def stop(self) -> None:
        """Stop the active generation at its next token."""
        self._stopping.set()
        self._writer.shutdown(wait=False, cancel_futures=True)

    async def _page(self, request: web.Request) -> web.Response:
        return web.Response(text=PAGE.read_text(encoding="utf-8"), content_type="text/html", headers=HEADERS)

    async def _facts(self, request: web.Request) -> web.Response:
        return web.json_response(self.playground.facts(), headers=HEADERS)

    async def _write(self, request: web.Request) -> web.StreamResponse:
        if request.content_type != "application/json":  # CSRF: other sites cannot send it without a preflight request
            return _error_response("Send JSON, with Content-Type: application/json.", 415)
        generation = self.playground.read(await request.read())
        if self._stopping.is_set():
            return _error_response(STOPPED, 503)
        if self._active > MAX_WAITING:
            return _error_response(f"{MAX_WAITING} requests are waiting already. Try again in a moment.", 503)
        response = web.StreamResponse(headers={**HEADERS, "Content-Type": "application/x-ndjson"})
        self._active += 1
        try:
            await response.prepare(request)
            async with aclosing(self._events(generation)) as events:
                async for event in events:
                    await response.write(json.dumps(event).encode() + b"\n")
        except ConnectionError:
            pass  # the page was closed
        finally:
            self._active -= 1
        return response

    async def _events(self, generation: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generate in the writer thread and yield its events; closing this generator stops the thread."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | None]()
        closed = threading.Event()

        def send(event: Event) -> None:
            if closed.is_set() or self._stopping.is_set():
                raise Cancelled
            loop.call_soon_threadsafe(events.put_nowait, event)

        if self._active > 1:
            yield {"waiting": self._active - 1}
        writing = loop.run_in_executor(self._writer, self.playground.write, generation, send)
        writing.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            error = None if writing.cancelled() else writing.exception()
            if writing.cancelled() or isinstance(error, Cancelled):
                yield {"error": STOPPED}
            elif error is not None:
                traceback.print_exception(error)
                yield {"error": FAILED}
        finally:
            closed.set()
            writing.cancel()


@web.middleware
async def _handle_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Reject foreign Origin and Host headers (CSRF, DNS rebinding); return errors as JSON."""
    try:
        if not all(_is_local(url) for url in (f"//{request.host}", request.headers.get("Origin")) if url):
            return _error_response("This page works on this machine only. Open http://127.0.0.1 with its port.", 403)
        return await handler(request)
    except InputError as error:
        return _error_response(str(error), 400)
    except web.HTTPRequestEntityTooLarge:
        return _error_response(
            f"The prompt is too long: a request may have {MAX_REQUEST_BYTES:,} bytes. Shorten it.", 413
        )
    except web.HTTPException as error:
        return _error_response(f"{error.reason}.", error.status)
    except Exception as error:  # an internal error ends one request, not the server
        traceback.print_exception(error)
        return _error_response(FAILED, 500)


def _is_local(url: str) -> bool:
    try:
        return urlsplit(url).hostname in LOCAL_NAMES
    except ValueError:
        return False


def _error_response(message: str, status: int) -> web.Response:
    return web.json_response({"error": message}, status=status, headers=HEADERS)
