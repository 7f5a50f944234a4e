"""Local server on 127.0.0.1 with the part of the Hub's API through which data sets are read."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.local_server import Handler, LocalServer

TOKEN = "hf_test"
MAIN, CONVERTED = "main", "refs/convert/parquet"
API = re.compile(
    r"/api/datasets/(?P<name>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info)/(?P<rev>[^/]+)(?P<path>/.*)?)?"
)
FILE = re.compile(r"/datasets/(?P<name>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)")


class Hub(LocalServer):
    """Data sets of the server, and the requests that it has received.

    Attributes:
        sets: name → revision → path → content.
        gated: names of the sets that need TOKEN.
        faults: the next requests for a file fail in this way: a status, "reset" without an answer, or "cut" after half
            of the content.
        faulty: method and ending of the path of the requests that `faults` affects.
        requests: number of requests by method and path.
    """

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.sets: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.faults: list[int | str] = []
        self.faulty = ("GET", "")
        self.requests: Counter[str] = Counter()

    def add(self, name: str, files: dict[str, bytes], revision: str = MAIN) -> None:
        self.sets.setdefault(name, {})[revision] = files


class _Handler(Handler):
    server: Hub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests[f"{self.command} {path}"] += 1
        found = FILE.fullmatch(path) or API.fullmatch(path)
        name = found["name"] if found else ""
        if found is None or name not in self.server.sets:
            return self._refuse(401, "RepoNotFound")
        if name in self.server.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
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
        revisions = self.server.sets[name]
        by_commit = {commit(name, other): files for other, files in revisions.items()}
        return revisions.get(revision) or by_commit.get(revision)

    def _api(self, found: re.Match[str], name: str, revision: str, files: dict[str, bytes]) -> None:
        entries = [_entry(path, content) for path, content in files.items()]
        if found["what"] == "tree":
            below = unquote(found["path"] or "").strip("/")
            recursive = "recursive=true" in self.path.lower()
            return self.respond_json(_tree(entries, below, recursive))
        if found["what"] == "paths-info":
            paths = json.loads(self.body())["paths"]
            folders = {parent for path in files for parent in _parents(path)}
            found_folders = [_folder(path) for path in paths if path in folders]
            return self.respond_json([entry for entry in entries if entry["path"] in paths] + found_folders)
        sha = revision if re.fullmatch("[0-9a-f]{40}", revision) else commit(name, revision)
        siblings = [{"rfilename": path} for path in files]
        return self.respond_json({"id": name, "sha": sha, "siblings": siblings, "private": False, "tags": []})

    def _file(self, name: str, revision: str, files: dict[str, bytes], path: str) -> None:
        content = files.get(path)
        sha = revision if re.fullmatch("[0-9a-f]{40}", revision) else commit(name, revision)
        if content is None:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": sha})
        method, ending = self.server.faulty
        fails = self.server.faults and self.command == method and path.endswith(ending)
        fault = self.server.faults.pop(0) if fails else None
        if fault == "reset":
            self.close_connection = True
            return None
        if isinstance(fault, int):
            return self._refuse(fault, "")
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(ranged[1]) if ranged else 0
        stop = int(ranged[2]) + 1 if ranged and ranged[2] else len(content)
        part = content[start:stop]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_blob(content)}"', "Accept-Ranges": "bytes"}
        headers["Content-Length"] = str(len(part))
        if ranged:
            headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        self.respond(part[: len(part) // 2] if fault == "cut" else part, 206 if ranged else 200, headers)
        self.close_connection = fault == "cut"
        return None

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.body()
        self.respond(status=status, headers={"X-Error-Code": code, **(headers or {})})


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
