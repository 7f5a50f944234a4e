"""Local server on 127.0.0.1 with the part of the Hub's API through which data sets are read."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

MAIN, CONVERTED = "main", "refs/convert/parquet"
API = re.compile(
    r"/api/datasets/(?P<name>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info)/(?P<rev>[^/]+)(?P<path>/.*)?)?"
)
FILE = re.compile(r"/datasets/(?P<name>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)")


@dataclass
class Hub:
    """Data sets of the server, and the requests that it has received.

    Attributes:
        sets: name → revision → path → content.
        gated: names of the sets that need TOKEN.
        faults: the next requests for a file fail in this way: a status, "reset" without an answer, or "cut" after half
            of the content.
        faulty: method and ending of the path of the requests that `faults` affects.
        requests: number of requests by method and path.
    """

    sets: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    faults: list[int | str] = field(default_factory=list)
    faulty: tuple[str, str] = ("GET", "")
    requests: Counter[str] = field(default_factory=Counter)
    url: str = ""

    def add(self, name: str, files: dict[str, bytes], revision: str = MAIN) -> None:
        self.sets.setdefault(name, {})[revision] = files


TOKEN = "hf_test"


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests[f"{self.command} {path}"] += 1
        found = FILE.fullmatch(path) or API.fullmatch(path)
        name = found["name"] if found else ""
        if found is None or name not in self.hub.sets:
            return self._refuse(401, "RepoNotFound")
        if name in self.hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "GatedRepo")
        revision = unquote(found["rev"] or MAIN)
        files = self._files(name, revision)
        if files is None:
            return self._refuse(404, "RevisionNotFound")
        if found.re is FILE:
            return self._file(name, revision, files, unquote(found["path"]))
        return self._api(found, name, revision, files)

    do_HEAD = do_POST = do_GET

    def _files(self, name: str, revision: str) -> dict[str, bytes] | None:
        revisions = self.hub.sets[name]
        by_commit = {commit(name, other): files for other, files in revisions.items()}
        return revisions.get(revision) or by_commit.get(revision)

    def _api(self, found: re.Match[str], name: str, revision: str, files: dict[str, bytes]) -> None:
        entries = [_entry(path, content) for path, content in files.items()]
        if found["what"] == "tree":
            below = unquote(found["path"] or "").strip("/")
            recursive = "recursive=true" in self.path.lower()
            return self._json(_tree(entries, below, recursive))
        if found["what"] == "paths-info":
            paths = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
            folders = {parent for path in files for parent in _parents(path)}
            found_folders = [_folder(path) for path in paths if path in folders]
            return self._json([entry for entry in entries if entry["path"] in paths] + found_folders)
        sha = revision if re.fullmatch("[0-9a-f]{40}", revision) else commit(name, revision)
        siblings = [{"rfilename": path} for path in files]
        return self._json({"id": name, "sha": sha, "siblings": siblings, "private": False, "tags": []})

    def _file(self, name: str, revision: str, files: dict[str, bytes], path: str) -> None:
        content = files.get(path)
        sha = revision if re.fullmatch("[0-9a-f]{40}", revision) else commit(name, revision)
        if content is None:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": sha})
        method, ending = self.hub.faulty
        fails = self.hub.faults and self.command == method and path.endswith(ending)
        fault = self.hub.faults.pop(0) if fails else None
        if fault == "reset":
            self.close_connection = True
            return None
        if isinstance(fault, int):
            return self._refuse(fault, "")
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(ranged[1]) if ranged else 0
        stop = int(ranged[2]) + 1 if ranged and ranged[2] else len(content)
        part = content[start:stop]
        self.send_response(206 if ranged else 200)
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{_blob(content)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        self.wfile.write(part[: len(part) // 2] if fault == "cut" else part)
        self.close_connection = fault == "cut"
        return None

    def _json(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        if self.command == "POST":
            self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(status)
        for key, value in {"X-Error-Code": code, "Content-Length": "0", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        """Log nothing."""


def commit(name: str, revision: str) -> str:
    """Return the commit of a revision."""
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


def _blob(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": _blob(path.encode())}


def _parents(path: str) -> list[str]:
    return [str(parent) for parent in Path(path).parents if str(parent) != "."]


def _tree(entries: list[dict[str, Any]], below: str, recursive: bool) -> list[dict[str, Any]]:
    inside = [entry for entry in entries if not below or below in _parents(entry["path"])]
    folders = {parent for entry in inside for parent in _parents(entry["path"]) if parent != below}
    everything = [*inside, *(_folder(path) for path in sorted(folders) if not below or below in _parents(path))]
    depth = below.count("/") + 1 if below else 0
    return [entry for entry in everything if recursive or entry["path"].count("/") == depth]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub while the block runs; `hub.url` is its address."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, daemon=True).start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()
