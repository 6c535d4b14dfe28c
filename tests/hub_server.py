"""A stand-in for the Hugging Face hub on this machine: its address goes into HF_ENDPOINT."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 39 + "1"


class HubServer(ThreadingHTTPServer):
    """A server of the repositories in a folder: <folder>/<owner>/<name>/<files>.

    Attributes:
        fetched: paths of the files that were sent, in order.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder, self.fetched = folder, []

    @property
    def url(self) -> str:
        """Address of the server."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def log_message(self, *args: object) -> None:
        """Stay silent."""

    def _answer(self, send: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        repository = self.server.folder.joinpath(*parts[2 if is_api else 0 :][:2])
        if is_api and repository.is_dir():
            about = json.dumps(_tree(repository) if "tree" in parts else _info(repository))
            return self._send(200, about.encode(), send)
        file = repository.joinpath(*parts[4:])
        if not is_api and parts[2:3] == ["resolve"] and file.is_file():
            if send:
                self.server.fetched.append(file.relative_to(repository).as_posix())
            return self._send(200, file.read_bytes(), send)
        return self._send(404, b"{}", send)

    def _send(self, status: int, body: bytes, send: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{_digest(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if send:
            with suppress(ConnectionError):  # the client stopped
                self.wfile.write(body)


def _digest(body: bytes) -> str:
    """Return 40 digits that tell a file's content."""
    return hashlib.sha256(body).hexdigest()[:40]


def _files(repository: Path) -> list[Path]:
    return [path for path in sorted(repository.rglob("*")) if path.is_file()]


def _info(repository: Path) -> dict:
    """Return what the hub says about a model."""
    names = [path.relative_to(repository).as_posix() for path in _files(repository)]
    name = "/".join(repository.parts[-2:])
    return {
        "_id": "1",
        "id": name,
        "modelId": name,
        "sha": COMMIT,
        "private": False,
        "tags": [],
        "siblings": [{"rfilename": each} for each in names],
    }


def _tree(repository: Path) -> list[dict]:
    """Return the hub's list of a model's files."""
    return [
        {
            "type": "file",
            "path": path.relative_to(repository).as_posix(),
            "size": path.stat().st_size,
            "oid": _digest(path.read_bytes()),
        }
        for path in _files(repository)
    ]


@contextmanager
def hub_server(folder: Path) -> Iterator[HubServer]:
    """Serve the repositories in a folder."""
    with HubServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
