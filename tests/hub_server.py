"""A stand-in for the Hugging Face hub on this machine: its address goes into HF_ENDPOINT."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 39 + "1"


LARGE = (".safetensors", ".pt", ".pkl", ".npz")  # files that the hub keeps with LFS


class HubServer(ThreadingHTTPServer):
    """A server of the repositories in a folder: <folder>/<owner>/<name>/<files>.

    Attributes:
        fetched: paths of the files that were sent, in order.
        starts: for each of them, the first byte that was asked for.
        stop_at: files that stop after some bytes, once each: path and number of bytes.
        stopped: set while one has stopped; it goes on when this is cleared.
        damaged: paths of files whose first byte is sent wrong.
        gated: repositories whose licence has to be accepted.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder, self.fetched, self.starts = folder, [], []
        self.stop_at: dict[str, int] = {}
        self.stopped = threading.Event()
        self.damaged: set[str] = set()
        self.gated: set[str] = set()

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
        names = parts[2 if is_api else 0 :][:2]
        repository = self.server.folder.joinpath(*names)
        if is_api and repository.is_dir():
            about = json.dumps(_tree(repository) if "tree" in parts else _info(repository))
            return self._send(200, about.encode(), send)
        file = repository.joinpath(*parts[4:])
        if not is_api and parts[2:3] == ["resolve"] and file.is_file():
            if "/".join(names) in self.server.gated:
                return self._send(403, b"{}", send, error="GatedRepo")
            return self._send_file(file, file.relative_to(repository).as_posix(), send)
        return self._send(404, b"{}", send, error="RepoNotFound")

    def _send_file(self, file: Path, path: str, send: bool) -> None:
        """Send a file, from the byte on that the client asks for."""
        body, start = file.read_bytes(), 0
        asked = self.headers.get("Range", "")
        if send:
            start = int(asked.removeprefix("bytes=").partition("-")[0] or 0)
            self.server.fetched.append(path)
            self.server.starts.append(start)
            if path in self.server.damaged:
                body = bytes([body[0] ^ 1]) + body[1:]
        stop = self.server.stop_at.pop(path, None) if send else None
        self._send(206 if asked else 200, body, send, start, stop)

    def _send(
        self,
        status: int,
        body: bytes,
        send: bool,
        start: int = 0,
        stop: int | None = None,
        error: str = "",
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", f'"{_digest(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if send:
            with suppress(ConnectionError):  # the client stopped
                self.wfile.write(body[start:stop])
                if stop is not None:
                    self.wfile.flush()
                    self.server.stopped.set()
                    while self.server.stopped.is_set():
                        time.sleep(0.05)
                    self.wfile.write(body[stop:])


def _digest(body: bytes) -> str:
    """Return 40 digits that tell a file's content."""
    return hashlib.sha256(body).hexdigest()[:40]


def _files(repository: Path) -> list[Path]:
    return [path for path in sorted(repository.rglob("*")) if path.is_file()]


def _info(repository: Path) -> dict:
    """Return what the hub says about a model, with its files' sizes and digests."""
    name = "/".join(repository.parts[-2:])
    return {
        "_id": "1",
        "id": name,
        "modelId": name,
        "sha": COMMIT,
        "private": False,
        "tags": [],
        "siblings": [_sibling(path, repository) for path in _files(repository)],
    }


def _sibling(path: Path, repository: Path) -> dict:
    """Return what the hub says about a file."""
    body = path.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(body) + body)  # noqa: S324
    about = {"rfilename": path.relative_to(repository).as_posix(), "size": len(body)}
    about["blobId"] = git.hexdigest()
    if path.suffix in LARGE:
        digest = hashlib.sha256(body).hexdigest()
        about["lfs"] = {"size": len(body), "sha256": digest, "pointerSize": 134}
    return about


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
