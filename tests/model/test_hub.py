"""Fetching over a connection that breaks, from a hub of our own."""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 4000}


class Hub(ThreadingHTTPServer):
    """One repository; `cut` says after how many bytes the connection breaks while sending the weights.

    `unlisted` is a file that is not in the tree of the commit, `refuses` the beginning of paths that end in an error.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commit = secrets.token_hex(20)
        self.cut: int | None = None
        self.status = 200
        self.unlisted = ""
        self.refuses = ""
        self.sent: list[tuple[str, str | None]] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.server.refuses and self.path.startswith(self.server.refuses):
            self._send(b'{"error": "unavailable"}', status=503)
        elif self.path.partition("?")[0] == "/api/models/org/model" or self.path.startswith(
            "/api/models/org/model/revision/"
        ):
            siblings = [{"rfilename": name} for name in FILES]
            self._send(json.dumps({"id": "org/model", "sha": self.server.commit, "siblings": siblings}).encode())
        elif self.path.startswith(f"/api/models/org/model/tree/{self.server.commit}"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in FILES.items()]
            tree = [entry for entry in tree if entry["path"] != self.server.unlisted]
            self._send(json.dumps(tree).encode())
        elif self.path.startswith(f"/org/model/resolve/{self.server.commit}/"):
            name = self.path.rpartition("/")[2].partition("?")[0]
            if self.command == "GET":
                self.server.sent.append((name, self.headers.get("Range")))
            self._send(FILES[name], name)
        else:
            self._send(b'{"error": "Repository not found"}', status=404)

    def _send(self, body: bytes, name: str = "", status: int = 0) -> None:
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        status = status or (206 if begin else self.server.status)
        self.send_response(status)
        for key, value in (
            ("Content-Length", len(body) - begin),
            ("ETag", f'"{name}"'),
            ("X-Repo-Commit", self.server.commit),
            ("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}"),
        ):
            self.send_header(key, str(value))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.cut if name == "model.safetensors" else None
        self.wfile.write(body[begin:cut] if cut is not None else body[begin:])
        if cut is not None:  # a reset, as by a router
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(hub: Hub, folder: Path, model: str = "org/model") -> tuple[str, str]:
    """Returns what kind of error came, or "ok", and its message or the directory."""
    script = (
        "import os, sys, time\n"
        f"os.environ |= {{'HF_ENDPOINT': 'http://127.0.0.1:{hub.server_address[1]}', 'HF_HOME': {str(folder)!r},"
        f" 'HF_HUB_CACHE': {str(folder / 'hub')!r}, 'HF_HUB_OFFLINE': '0',"
        " 'HF_HUB_DISABLE_XET': '1', 'NO_PROXY': '127.0.0.1', 'no_proxy': '127.0.0.1',"
        " 'HF_HUB_DISABLE_PROGRESS_BARS': '1'}\n"
        "from lighten.errors import LightenError\n"
        "from lighten.model import hub\n"
        "time.sleep = lambda seconds: None\n"
        "try:\n"
        f"    print('ok', hub.fetch({model!r}, None, ['*.json', '*.safetensors']), sep='\\t')\n"
        "except LightenError as error:\n"
        "    print(type(error).__name__, error, sep='\\t')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kind, _, text = done.stdout.strip().partition("\t")
    return kind, text


def test_a_broken_connection_is_one_message_and_what_arrived_is_kept(hub: Hub, tmp_path: Path) -> None:
    hub.cut = 200_000
    kind, text = fetch(hub, tmp_path)
    assert kind == "Failure", (text, hub.sent)
    assert "broke 3 times" in text and "files that have arrived are kept" in text and "\n" not in text
    hub.cut, hub.sent = None, []
    kind, text = fetch(hub, tmp_path)
    assert kind == "ok"
    assert {path.name: path.read_bytes() for path in Path(text).iterdir()} == FILES
    assert {name for name, _ in hub.sent} == {"model.safetensors"}


def test_a_directory_that_lacks_a_file_of_the_hubs_list_is_not_given_back(hub: Hub, tmp_path: Path) -> None:
    hub.unlisted = "model.safetensors"
    kind, text = fetch(hub, tmp_path)
    assert kind == "Failure", text
    assert "not arrived: model.safetensors" in text


def test_what_has_arrived_is_used_while_the_hub_is_down(hub: Hub, tmp_path: Path) -> None:
    whole = fetch(hub, tmp_path)
    assert whole[0] == "ok"
    hub.refuses = "/"
    assert fetch(hub, tmp_path) == whole


def test_half_of_a_model_is_not_used_while_the_hub_is_down(hub: Hub, tmp_path: Path) -> None:
    hub.cut = 200_000
    assert fetch(hub, tmp_path)[0] == "Failure"
    hub.cut, hub.refuses = None, "/"
    kind, text = fetch(hub, tmp_path)
    assert kind == "RequestError", text
    assert "check the name, the revision and the connection" in text


def test_what_the_hub_does_not_have_is_a_wrong_request(hub: Hub, tmp_path: Path) -> None:
    kind, text = fetch(hub, tmp_path, "org/other")
    assert kind == "RequestError"
    assert "org/other: no such directory here" in text
