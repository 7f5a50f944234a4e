"""Stand-in for W&B's server on this machine: enough of GraphQL and of the stream of files for a run to start.

As a program: python tests/support/wandb_server.py BEHAVIOUR prints its port. It `answers` requests; or `resumes`, and
has the first three steps of a run; or is `silent`: it accepts connections and never responds; or `stops`: it is silent
after the first rows of a run have arrived.
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

RUN = {"id": "cnVu", "name": "run", "displayName": "run", "historyLineCount": 0, "config": "{}"}
RUN |= {"project": {"id": "p", "name": "project", "entity": {"id": "e", "name": "entity"}}, "sweepName": None}
USER = {"id": "u", "entity": "entity", "username": "user", "email": "", "flags": "{}", "teams": {"edges": []}}

RESUMED = {
    **RUN,
    "summaryMetrics": '{"step": 3, "_step": 2}',
    "historyTail": '["{\\"_step\\": 2}"]',
    "eventsTail": "[]",
}
RESUMED |= {"wandbConfig": '{"t": 1}', "historyLineCount": 3, "logLineCount": 0, "eventsLineCount": 0, "tags": []}
ARTIFACT: dict[str, Any] = {"id": "a", "state": "COMMITTED"}
ARTIFACT["artifactSequence"] = {"id": "s", "latestArtifact": {"id": "a", "versionIndex": 0}}


class Server(ThreadingHTTPServer):
    """Stand-in on a free port of 127.0.0.1.

    Attributes:
        queries: GraphQL requests and streamed files so far.
    """

    daemon_threads = True

    def __init__(self, behaviour: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour, self.queries = behaviour, []
        self.is_silent = behaviour == "silent"
        self.never = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def data(self, query: str) -> dict[str, Any]:
        """Return the data of the response to a GraphQL request."""
        if "upsertBucket" in query:
            return {"upsertBucket": {"bucket": RUN, "inserted": True}}
        if "viewer" in query:
            return {"viewer": USER}
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": []}}
        if "serverInfo" in query:
            return {"serverInfo": {"features": [], "cliVersionInfo": {}}}
        if "createArtifact(" in query:
            return {"createArtifact": {"artifact": ARTIFACT}}
        return {"model": {"bucket": RESUMED if self.behaviour == "resumes" else None}}


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.is_silent:
            self.server.never.wait()
        if self.path.endswith("file_stream"):
            self.server.queries.append("file_stream")
            self.server.is_silent = self.server.behaviour == "stops"
            self._answer({"limits": {}})
            return
        if not self.path.endswith("graphql"):
            self._answer({})
            return
        query = json.loads(body)["query"]
        self.server.queries.append(query.split("(")[0].split("{")[0].strip())
        self._answer({"data": self.server.data(query)})

    do_GET = do_PUT = do_POST

    def _answer(self, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_unused: Any) -> None:
        """Print nothing."""


if __name__ == "__main__":
    server = Server(sys.argv[1])
    print(server.server_port, flush=True)
    server.never.wait()
