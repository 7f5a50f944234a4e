"""Local server on 127.0.0.1 with the part of the Hub's API through which models are uploaded."""

import base64
import json
from typing import Any
from urllib.parse import urlsplit

from tests.support.local_server import Handler, LocalServer

TOKEN = "hf_test"
OID = "0123456789abcdef0123456789abcdef01234567"


class Uploads(LocalServer):
    """Server, and what it has received.

    Attributes:
        refused: ending of a path → status, or 0: the request is never answered.
        created: body of each request for a repository.
        branches: branches that were created.
        files: (repository, branch) → path → content.
        messages: message of each commit.
        cards: metadata that the server was asked to validate.
    """

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.refused: dict[str, int] = {}
        self.created: list[dict[str, Any]] = []
        self.branches: list[str] = []
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.cards: list[str] = []


class _Handler(Handler):
    server: Uploads

    def do_GET(self) -> None:
        if "/api/repos/create" in self.server.refused:
            return self.respond_json({"error": "not found"}, 404)
        return self.respond_json({"id": "user/model", "sha": OID, "siblings": [], "private": False, "tags": []})

    def do_POST(self) -> None:
        body = self.body()
        path = urlsplit(self.path).path
        status = next((code for ending, code in self.server.refused.items() if path.endswith(ending)), 200)
        if status == 0:
            return self.hang()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        if status != 200:
            return self.respond_json({"error": f"refused with {status}"}, status)
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            given = self.server.created[-1]
            name = f"{given['organization']}/{given['name']}"
            return self.respond_json({"url": f"{self.server.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            return self.respond_json({"errors": [], "warnings": []})
        if parts[4] == "branch":
            self.server.branches.append(parts[5])
            return self.respond_json({})
        if parts[4] == "preupload":
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self.respond_json({"files": files})
        return self._commit(f"{parts[2]}/{parts[3]}", parts[5], body)

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.server.messages.append(line["value"]["summary"])
            elif line["key"] == "file":
                files = self.server.files.setdefault((name, branch), {})
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.respond_json({"commitUrl": f"{self.server.url}/{name}/commit/{OID}", "commitOid": OID, "hookOutput": ""})
