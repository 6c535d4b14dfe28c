"""A small client of a ComfyUI server: run prompts; read pictures, errors, progress, previews."""

from __future__ import annotations

import io
import json
import struct
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any, NamedTuple

import numpy as np
import websocket
from PIL import Image

TEXT, PREVIEW_WITH_METADATA = 3, 4  # protocol.BinaryEventTypes


class Progress(NamedTuple):
    """One step of a node's progress bar."""

    node: str
    value: float
    max: float


@dataclass
class Result:
    """Outcome of one prompt. ``status`` is success, error, interrupted or rejected."""

    prompt_id: str
    status: str
    # node -> the output that the interface shows
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    images: dict[str, list[Image.Image]] = field(default_factory=dict)  # node -> its pictures
    errors: dict[str, str] = field(default_factory=dict)  # node ("" for the prompt itself) -> text
    executed: list[str] = field(default_factory=list)  # nodes in the order they ran
    cached: list[str] = field(default_factory=list)  # nodes that did not run again
    progress: list[Progress] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)  # JPEG or PNG files
    # node -> the last text that it showed on itself while it ran
    texts: dict[str, str] = field(default_factory=dict)
    traceback: str = ""  # of the node that failed

    @property
    def image(self) -> Image.Image:
        """Return the only picture of the prompt."""
        (image,) = [image for images in self.images.values() for image in images]
        return image

    @property
    def array(self) -> np.ndarray:
        """Return the only picture as float32 in [0, 1], height x width x channels."""
        return np.asarray(self.image, np.float32) / 255


class PromptError(AssertionError):
    """Raised if the server rejects a prompt or one of its nodes fails."""

    def __init__(self, result: Result):
        lines = [f"node {node}: {text}" if node else text for node, text in result.errors.items()]
        super().__init__("\n".join([f"prompt {result.status}", *lines, result.traceback]).strip())
        self.result = result


@dataclass
class _Run:
    """Messages of the websocket about one prompt."""

    executed: list[str] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    done: bool = False


class Comfy:
    """A ComfyUI server at ``url`` with the base directory ``base``."""

    def __init__(self, url: str, base: Path, log_path: Path, process: Popen[bytes]):
        self.url, self.base, self._log_path, self.process = url, base, log_path, process
        self.client_id = uuid.uuid4().hex
        self._runs: dict[str, _Run] = {}
        # errors of outputs that ComfyUI drops from a prompt before it queues the rest
        self._left_out: dict[str, dict[str, str]] = {}
        self._heard = threading.Condition()
        self._now = _Run()  # the prompt that is running
        self._socket: websocket.WebSocket | None = None

    # --- the server

    def log(self) -> str:
        """Return what the server has printed so far."""
        return self._log_path.read_text(encoding="utf-8", errors="replace")

    def wait_ready(self, timeout: float = 120) -> None:
        """Wait until the server answers, and connect to its websocket.

        Raises:
            RuntimeError: the server has ended; the message holds the end of its log.
            TimeoutError: no answer in `timeout` seconds; the message holds the end of its log.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                self.get("/system_stats")
                break
            except OSError as error:
                self._check_alive()
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"ComfyUI did not answer in {timeout:g} s\n{self._log_tail()}"
                    ) from error
                time.sleep(0.2)
        self._socket = websocket.create_connection(
            f"ws{self.url[4:]}/ws?clientId={self.client_id}", timeout=30
        )
        self._socket.send(
            json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
        )
        self._socket.settimeout(None)
        threading.Thread(target=self._listen, args=(self._socket,), daemon=True).start()

    def close(self) -> None:
        """Stop the server."""
        if self._socket is not None:
            self._socket.close(timeout=1)
        self.process.terminate()
        try:
            self.process.wait(10)
        except TimeoutExpired:
            self.process.kill()

    def get(self, path: str) -> Any:
        """Return the JSON answer to GET."""
        return json.loads(self._request(path))

    def post(self, path: str, data: Any) -> Any:
        """Return the JSON answer to a POST of JSON; None if the answer is empty."""
        answer = self._request(path, json.dumps(data).encode())
        return json.loads(answer) if answer else None

    def read(self, path: str) -> bytes:
        """Return the bytes of the answer to GET."""
        return self._request(path)

    def view(self, reference: dict[str, str]) -> Image.Image:
        """Load the picture that an output names by filename, subfolder and type."""
        keys = {key: reference.get(key, "") for key in ("filename", "subfolder", "type")}
        image = Image.open(io.BytesIO(self._request(f"/view?{urllib.parse.urlencode(keys)}")))
        image.load()
        return image

    def object_info(self, kind: str = "") -> dict[str, Any]:
        """Return all node types, or a single one if there is it, with their inputs and outputs."""
        return self.get(f"/object_info/{kind}".rstrip("/"))

    # --- prompts

    def run(
        self, prompt: dict[str, Any], timeout: float = 120, expect_error: bool = False
    ) -> Result:
        """Run a prompt in API format to its end.

        Raises:
            PromptError: the prompt is rejected or fails, and no error is expected.
        """
        try:
            return self.wait(self.submit(prompt), timeout, expect_error)
        except PromptError as error:
            if not expect_error:
                raise
            return error.result

    def submit(self, prompt: dict[str, Any], **extra_data: Any) -> str:
        """Queue a prompt and return its id.

        Raises:
            PromptError: the server rejects the prompt.
        """
        body = {"prompt": prompt, "client_id": self.client_id, "extra_data": extra_data}
        try:
            answer = self.post("/prompt", body)
        except urllib.error.HTTPError as error:
            answer = json.loads(error.read())
            result = Result("", "rejected", errors=prompt_errors(answer))
            result.traceback = validation_traceback(answer)
            raise PromptError(result) from None
        self._left_out[answer["prompt_id"]] = prompt_errors(answer)
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 120, expect_error: bool = False) -> Result:
        """Wait for the end of a prompt and return its result.

        Raises:
            PromptError: a node failed, and no error is expected.
            TimeoutError: the prompt has not ended in `timeout` seconds.
        """
        self._wait_until(prompt_id, lambda run: run.done, timeout, "end")
        result = self.result(prompt_id)
        if result.errors and not expect_error:
            raise PromptError(result)
        return result

    def result(self, prompt_id: str) -> Result:
        """Return the result of a prompt that has ended, whoever queued it."""
        history = self.get(f"/history/{prompt_id}")[prompt_id]
        run = self._runs.get(prompt_id, _Run())
        result = Result(
            prompt_id, "success", history["outputs"], errors=dict(self._left_out.get(prompt_id, {}))
        )
        result.executed, result.progress, result.previews = (
            list(run.executed),
            list(run.progress),
            list(run.previews),
        )
        result.texts = dict(run.texts)
        for kind, data in history["status"]["messages"]:
            if kind == "execution_cached":
                result.cached = data["nodes"]
            elif kind == "execution_interrupted":
                result.status = "interrupted"
            elif kind == "execution_error":
                result.status = "error"
                result.errors[data["node_id"]] = (
                    f"{data['exception_type']}: {data['exception_message'].strip()}"
                )
                result.traceback = "".join(data["traceback"])
        for node, output in result.outputs.items():
            if "images" in output:
                result.images[node] = [self.view(reference) for reference in output["images"]]
        return result

    def wait_progress(self, prompt_id: str, value: float = 1, timeout: float = 120) -> Progress:
        """Wait until a progress bar of the prompt has reached ``value``, and return that step."""
        found: list[Progress] = []

        def reached(run: _Run) -> bool:
            found[:] = [step for step in run.progress if step.value >= value][:1]
            return bool(found) or run.done

        self._wait_until(prompt_id, reached, timeout, "progress")
        if not found:
            raise AssertionError(f"the prompt ended before its progress reached {value:g}")
        return found[0]

    def interrupt(self) -> None:
        """Interrupt the prompt that runs now."""
        self.post("/interrupt", {})

    # --- inside

    def _request(self, path: str, data: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return answer.read()

    def _log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def _check_alive(self) -> None:
        if self.process.poll() is not None:
            raise RuntimeError(
                f"ComfyUI ended with exit code {self.process.returncode}\n{self._log_tail()}"
            )

    def _wait_until(
        self, prompt_id: str, ready: Callable[[_Run], bool], timeout: float, what: str
    ) -> None:
        deadline = time.monotonic() + timeout
        with self._heard:
            while not ready(self._runs.setdefault(prompt_id, _Run())):
                self._check_alive()
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"no {what} of the prompt in {timeout:g} s\n{self._log_tail()}"
                    )
                self._heard.wait(0.5)

    def _listen(self, socket: websocket.WebSocket) -> None:
        while True:
            try:
                message = socket.recv()
            except (OSError, websocket.WebSocketException):
                return
            if not message:
                return
            with self._heard:
                self._hear(message)
                self._heard.notify_all()

    def _hear(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            kind, length = struct.unpack_from(">II", message)
            if kind == PREVIEW_WITH_METADATA:
                about = json.loads(message[8 : 8 + length])
                self._runs.setdefault(about["prompt_id"], _Run()).previews.append(
                    message[8 + length :]
                )
            elif kind == TEXT:
                self._now.texts[message[8 : 8 + length].decode()] = message[8 + length :].decode()
            return
        event = json.loads(message)
        data = event.get("data") or {}
        if not isinstance(data, dict) or "prompt_id" not in data:
            return
        run = self._runs.setdefault(data["prompt_id"], _Run())
        if event["type"] == "executing" and data["node"] is None:
            run.done = True
        elif event["type"] == "executing":
            run.executed.append(data["node"])
            self._now = run
        elif event["type"] == "progress":
            run.progress.append(Progress(data["node"], data["value"], data["max"]))


def prompt_errors(answer: dict[str, Any]) -> dict[str, str]:
    """Return the error texts in an answer to POST /prompt, by node."""
    errors = {}
    for node, about in answer.get("node_errors", {}).items():
        texts = [
            f"{error['message']}: {error['details']}".removesuffix(": ")
            for error in about["errors"]
        ]
        errors[node] = f"{about['class_type']}: {'; '.join(texts)}"
    if not errors and answer.get("error"):
        errors[""] = f"{answer['error']['message']}: {answer['error']['details']}".removesuffix(
            ": "
        )
    return errors


def validation_traceback(answer: dict[str, Any]) -> str:
    """Return the tracebacks of nodes whose validation failed, in an answer to POST /prompt."""
    return "".join(
        line
        for about in answer.get("node_errors", {}).values()
        for error in about["errors"]
        for line in error.get("extra_info", {}).get("traceback", ())
    )
