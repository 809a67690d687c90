"""The part of a W&B server that its client needs, on loopback and of the standard library, for tests of online mode.

Written against wandb 0.31.0: GraphQL operations by name, the file stream, uploads. Any operation that is not known is
answered with `{"data": {<field>: null}}`; an empty data object ends the client's service process.
"""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """Records what arrives. Use as a context manager; `stop()` before its end is a server that dies.

    Args:
        delay_s: waits this long before each answer.
        hang: GraphQL operations that are never answered.
        refuse: status code of every answer, e.g. 401; None for a working server.
    """

    def __init__(self, delay_s: float = 0.0, refuse: int | None = None, hang: tuple[str, ...] = ()):
        self.delay_s, self.refuse, self.hang = delay_s, refuse, hang
        self._stopped = threading.Event()
        self.runs: dict[str, dict[str, Any]] = {}  # variables of UpsertBucket by run id, merged
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.files: dict[str, bytes] = {}  # uploads by path
        self.operations: list[str] = []
        self._http = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> WandbServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Refuses connections from here on."""
        self._stopped.set()
        self._http.shutdown()
        self._http.server_close()

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        operation = (re.search(r"(?:query|mutation)\s+(\w+)", query) or [None, "?"])[1]
        self.operations.append(operation)
        if operation in self.hang:
            self._stopped.wait()
        if operation == "Viewer":
            return {"viewer": {"id": "VQ==", "entity": "lab", "username": "lab", "flags": "{}", "teams": {"edges": []}}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "UpsertBucket":
            run = self.runs.setdefault(variables["name"], {})
            run.update({k: v for k, v in variables.items() if v is not None})
            project = {
                "id": "UA==",
                "name": run.get("project") or "ulysses-exp",
                "entity": {"id": "RQ==", "name": "lab"},
            }
            bucket = {
                "id": "Ug==", "name": variables["name"], "displayName": run.get("displayName"), "description": "",
                "config": run.get("config"), "sweepName": "", "project": project, "historyLineCount": 0,
            }  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/upload/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": "Ug==", "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":
            artifact = {"id": "QQ==", "state": "COMMITTED", "artifactSequence": {"id": "Uw==", "latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if operation == "CreateArtifactType":
            return {"createArtifactType": {"artifactType": {"id": "VA=="}}}
        field = re.search(r"\{\s*(\w+)", query)
        return {field[1] if field else "unknown": None}

    def file_stream(self, sent: dict[str, Any]) -> None:
        files = sent.get("files") or {}
        for name, chunk in files.items():
            lines = [json.loads(line) for line in chunk.get("content", [])]
            if name == "wandb-history.jsonl":
                self.history += lines
            elif name == "wandb-summary.json":
                for line in lines:
                    self.summary = line
        if sent.get("complete"):
            self.exit_code = sent.get("exitcode")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what some of the tests are about."""


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("content-length") or 0))

        def _answer(self, content: object) -> None:
            server._stopped.wait(server.delay_s)
            body = json.dumps(content).encode()
            self.send_response(server.refuse or 200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            body = self._body()
            if server.refuse:
                self._answer({"errors": [{"message": "refused"}]})
            elif self.path == "/graphql":
                sent = json.loads(body)
                self._answer({"data": server.graphql(sent["query"], sent.get("variables") or {})})
            else:
                if self.path.endswith("/file_stream"):
                    server.file_stream(json.loads(body))
                self._answer({"exitcode": None, "limits": {}})

        def do_PUT(self) -> None:
            server.files[self.path.removeprefix("/upload/")] = self._body()
            self._answer({})

        def do_GET(self) -> None:
            self._answer({})

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
