"""A hub as small as pushing needs: it keeps what it is sent, and checks each file's hash as the real one does."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"


class Hub(ThreadingHTTPServer):
    """Repositories, each a list of commits, each a dict of path to bytes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.large: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""

    def answer(self, value: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self) -> None:
        content, oid = self.body(), self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != oid:
            self.answer({"error": "another hash"}, 400)
            return
        self.server.large[oid] = content
        self.answer({})

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            known = repo in self.server.repos
            self.server.repos.setdefault(repo, [])
            self.server.private.setdefault(repo, asked.get("private") or asked.get("visibility") == "private")
            self.answer({"url": f"{self.server.address}/{repo}"}, 409 if known else 200)
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [(file["path"], "regular" if file["size"] < 20_000 else "lfs") for file in files]
            told = [{"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None} for path, mode in modes]
            self.answer({"files": told})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.address}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self.commit(body)
        else:
            self.answer({"error": f"no such endpoint: {self.path}"}, 404)

    def commit(self, body: bytes) -> None:
        repo = "/".join(self.path.split("/")[3:5])
        files: dict[str, bytes] = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        self.server.repos[repo].append(files)
        url = f"{self.server.address}/{repo}/commit/abc"
        self.answer({"success": True, "commitUrl": url, "commitOid": "abc", "hookOutput": ""})


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """Yields a hub that listens on this machine."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
