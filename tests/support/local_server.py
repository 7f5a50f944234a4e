"""Local server: an HTTP server on 127.0.0.1 that stands in for one on the network while its `with` block runs."""

import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any, Self


class Handler(BaseHTTPRequestHandler):
    """Base of the handlers of requests, which log nothing."""

    server: "LocalServer"
    protocol_version = "HTTP/1.1"

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def respond(self, content: bytes = b"", status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def respond_json(self, content: Any, status: int = 200) -> None:
        self.respond(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def hang(self) -> None:
        """Never answer the request."""
        self.server.is_over.wait()
        self.close_connection = True

    def log_message(self, *_unused: Any) -> None:
        """Print nothing."""


class LocalServer(ThreadingHTTPServer):
    """Server on a free port.

    Attributes:
        url: its address.
        is_over: set when the `with` block has ended.
    """

    def __init__(self, handler: type[Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.is_over = Event()

    def __enter__(self) -> Self:
        Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_unused: Any) -> None:
        self.is_over.set()
        self.shutdown()
        self.server_close()
