"""Stand-in for W&B's server on this machine: enough of GraphQL and of the stream of files for a run to start.

It `answers` requests and keeps the rows and the summary of one run, which it does not rewind; or it `rewinds` that; or
it `hangs` then: such a request is never answered; or it is `silent`: it accepts connections and never responds; or
`stops`: it is silent after the first rows have arrived.
"""

import gzip
import json
from typing import Any

from tests.support.local_server import Handler, LocalServer

RUN = {"id": "cnVu", "name": "run", "displayName": "run", "historyLineCount": 0, "config": "{}"}
RUN |= {"project": {"id": "p", "name": "project", "entity": {"id": "e", "name": "entity"}}, "sweepName": None}
USER = {"id": "u", "entity": "entity", "username": "user", "email": "", "flags": "{}", "teams": {"edges": []}}

ARTIFACT: dict[str, Any] = {"id": "a", "state": "COMMITTED"}
ARTIFACT["artifactSequence"] = {"id": "s", "latestArtifact": {"id": "a", "versionIndex": 0}}
HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"


class Server(LocalServer):
    """Stand-in for W&B's server.

    Attributes:
        queries: GraphQL requests and streamed files so far.
        received: rows in the order in which they arrived.
        history: rows of the run.
        summary: summary of the run.
        rewinds: W&B steps to which the run was rewound.
    """

    def __init__(self, behaviour: str) -> None:
        super().__init__(_Handler)
        self.behaviour = behaviour
        self.queries: list[str] = []
        self.received: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.rewinds: list[float] = []
        self.is_silent = behaviour == "silent"

    @property
    def login(self) -> dict[str, str]:
        """Environment variables of a process that is logged in here and sends each row at once."""
        interval = {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "0.05"}
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online", **interval}

    def data(self, query: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """Return the data of the response to a GraphQL request; None for one that this server does not know."""
        if "upsertBucket" in query:
            return {"upsertBucket": {"bucket": RUN, "inserted": not self.history}}
        if "rewindRun" in query:
            return self._rewound(variables["metricValue"]) if self.behaviour == "rewinds" else None
        if "viewer" in query:
            return {"viewer": USER}
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": []}}
        if "serverInfo" in query:
            return {"serverInfo": {"features": [], "cliVersionInfo": {}}}
        if "createArtifact(" in query:
            return {"createArtifact": {"artifact": ARTIFACT}}
        return {"model": {"bucket": self._resumed() if self.history else None}}

    def receive(self, files: dict[str, Any]) -> None:
        """Store streamed rows from their offset on, and the summary."""
        if rows := files.get(HISTORY):
            new = [json.loads(line) for line in rows["content"]]
            self.received += new
            self.history[rows["offset"] : rows["offset"] + len(new)] = new
        if SUMMARY in files:
            self.summary = json.loads(files[SUMMARY]["content"][-1])

    def _rewound(self, step: float) -> dict[str, Any]:
        self.rewinds.append(step)
        self.history = [row for row in self.history if row["_step"] <= step]
        self.summary = {}
        return {"rewindRun": {"rewoundRun": {**RUN, "historyLineCount": len(self.history)}}}

    def _resumed(self) -> dict[str, Any]:
        counts = {"historyLineCount": len(self.history), "logLineCount": 0, "eventsLineCount": 0}
        tails = {"historyTail": json.dumps([json.dumps(self.history[-1])]), "eventsTail": "[]"}
        return {
            **RUN,
            **counts,
            **tails,
            "summaryMetrics": json.dumps(self.summary),
            "wandbConfig": '{"t": 1}',
            "tags": [],
        }


class _Handler(Handler):
    server: Server

    def do_POST(self) -> None:
        body = self.body()
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.server.is_silent:
            return self.hang()
        if self.path.endswith("file_stream"):
            self.server.queries.append("file_stream")
            self.server.receive(json.loads(body).get("files") or {})
            self.server.is_silent = self.server.behaviour == "stops"
            return self.respond_json({"limits": {}})
        if not self.path.endswith("graphql"):
            return self.respond_json({})
        request = json.loads(body)
        if "rewindRun" in request["query"] and self.server.behaviour == "hangs":
            return self.hang()
        self.server.queries.append(request["query"].split("(")[0].split("{")[0].strip())
        data = self.server.data(request["query"], request.get("variables") or {})
        errors = {"errors": [{"message": "Unknown field"}]}
        return self.respond_json(*((errors, 400) if data is None else ({"data": data}, 200)))

    do_GET = do_PUT = do_POST
