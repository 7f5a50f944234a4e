"""Local server on 127.0.0.1 with the part of the Hub's API through which models are uploaded."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_test"
OID = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Uploads:
    """What the server has received.

    Attributes:
        refused: ending of a path → status, or 0: the request is never answered.
        created: body of each request for a repository.
        branches: branches that were created.
        files: (repository, branch) → path → content.
        messages: message of each commit.
        cards: metadata that the server was asked to validate.
    """

    refused: dict[str, int] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    cards: list[str] = field(default_factory=list)
    url: str = ""
    released: threading.Event = field(default_factory=threading.Event)


class _Handler(BaseHTTPRequestHandler):
    uploads: Uploads
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if "/api/repos/create" in self.uploads.refused:
            return self._answer({"error": "not found"}, 404)
        return self._answer({"id": "user/model", "sha": OID, "siblings": [], "private": False, "tags": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        status = next((code for ending, code in self.uploads.refused.items() if path.endswith(ending)), 200)
        if status == 0:
            self.uploads.released.wait()
            self.close_connection = True
            return None
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        if status != 200:
            return self._answer({"error": f"refused with {status}"}, status)
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            self.uploads.created.append(json.loads(body))
            given = self.uploads.created[-1]
            name = f"{given['organization']}/{given['name']}"
            return self._answer({"url": f"{self.uploads.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            self.uploads.cards.append(json.loads(body)["content"])
            return self._answer({"errors": [], "warnings": []})
        if parts[4] == "branch":
            self.uploads.branches.append(parts[5])
            return self._answer({})
        if parts[4] == "preupload":
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        return self._commit(f"{parts[2]}/{parts[3]}", parts[5], body)

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.uploads.messages.append(line["value"]["summary"])
            elif line["key"] == "file":
                files = self.uploads.files.setdefault((name, branch), {})
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self._answer({"commitUrl": f"{self.uploads.url}/{name}/commit/{OID}", "commitOid": OID, "hookOutput": ""})

    def _answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Log nothing."""


@contextmanager
def receiving(uploads: Uploads) -> Iterator[Uploads]:
    """Serve while the block runs; `uploads.url` is the address."""
    handler = type("Handler", (_Handler,), {"uploads": uploads})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, daemon=True).start()
        uploads.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield uploads
        finally:
            uploads.released.set()
            server.shutdown()
