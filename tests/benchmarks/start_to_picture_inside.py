"""An extension of ComfyUI that notes when nodes and the network begin and end.

`start_to_picture.py` puts it into the servers that it compares, and reads the notes by
GET /start_to_picture. It wraps what all ways to sample share, ComfyUI's own classes, and imports
nothing of this repository.
"""

from __future__ import annotations

import time
import weakref
from typing import Any

import comfy.model_base
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, type] = {}
# what happened, the node's name ("" at the end of a prompt), seconds of the clock that processes
# share, seconds that the process has computed
Note = tuple[str, str, float, float]
NOTES: list[Note] = []


def note(what: str, name: str = "") -> None:
    """Note that something happens now."""
    NOTES.append((what, name, time.monotonic(), time.process_time()))


def watch_nodes() -> None:
    """Note when each node of a prompt begins, and when the prompt ends."""
    send = PromptServer.send_sync

    def send_noted(self: PromptServer, event: Any, data: Any, sid: str | None = None) -> None:
        if event == "executing":
            note("node", data.get("node") or "")
        send(self, event, data, sid)

    PromptServer.send_sync = send_noted


def watch_networks() -> None:
    """Note when a network begins, reaches its last layer, and ends, in every model that runs."""
    apply_model = comfy.model_base.BaseModel.apply_model
    watched: weakref.WeakSet = weakref.WeakSet()

    def apply_model_watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        network = self.diffusion_model
        if network not in watched:
            watched.add(network)
            network.register_forward_pre_hook(lambda *_: note("network begins"))
            network.final_layer.register_forward_pre_hook(lambda *_: note("last layer begins"))
            network.register_forward_hook(lambda *_: note("network ends"))
        return apply_model(self, *args, **kwargs)

    comfy.model_base.BaseModel.apply_model = apply_model_watched


@PromptServer.instance.routes.get("/start_to_picture")
async def notes(request: web.Request) -> web.Response:
    """Return the notes since the last request."""
    taken, NOTES[:] = list(NOTES), []
    return web.json_response(taken)


watch_nodes()
watch_networks()
