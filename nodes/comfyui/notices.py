"""Messages of a node that runs: in the log, and on the node in the page.

A page that has loaded web/js/messages.js gets them as an event, and asks for those of results that
ComfyUI has kept. Any other page gets them as the progress text of the node, of which it may show
two lines.
"""

from __future__ import annotations

import logging

from ...gmflow_core.files.errors import printable
from . import said
from .graph import Prompt, running_node, running_prompt, running_server

NOTHING = " "  # the page ignores an empty text
EVENT = ROUTE = "gmflow/messages"
MOST_PAGES = 1000  # pages that are remembered
# Module state, as ComfyUI keeps no place for what a node has said: node classes have no instances,
# and one prompt runs at a time.
_said: tuple[str | None, dict[str | None, dict[str, str]]] = (None, {})  # of the prompt that runs
_shown: set[str] = set()  # nodes that have a progress text on them
_pages: dict[str, None] = {}  # client ids of pages with our script, the latest last


def notice(message: str, level: int = logging.WARNING) -> None:
    """Log a message, and show it on the node that runs, once for each run of the node."""
    message, (node, messages) = printable(message), _of_running_node()
    if message in messages:
        return
    messages[message] = "warning" if level >= logging.WARNING else "info"
    logging.log(level, "GMFlow: %s", message)
    _show(node, messages)


def progress(message: str, former: str = "") -> str:
    """Show a message on the node that runs in the place of a former one, and return it."""
    message, (node, messages) = printable(message), _of_running_node()
    messages.pop(former, None)
    messages[message] = "info"
    _show(node, messages)
    return message


def clear() -> None:
    """Remove from the node that runs what it said in an earlier prompt."""
    node, messages = _of_running_node()
    if node is not None and not messages:
        _show(node, messages)


def answer(query: dict[str, str]) -> dict:
    """Return the messages that a page asks for, and remember that it shows them itself.

    Args:
        query: `client_id` of the page, and `prompt_id` or `workflow_id`. Of a workflow, the latest
            prompt counts.

    Returns:
        `workflow`, its id or None, and `messages`: node id -> its class and messages.
    """
    client = query.get("client_id")
    if client:
        _pages.pop(client, None)
        _pages[client] = None
        while len(_pages) > MOST_PAGES:
            _pages.pop(next(iter(_pages)))
    prompt, extra = _queued(query.get("prompt_id"), query.get("workflow_id"))
    messages = {
        node: {"type": prompt[node].get("class_type"), "messages": kept}
        for node, kept in said.recall(prompt).items()
    }
    return {"workflow": _workflow(extra), "messages": messages}


def register_route() -> None:
    """Let pages ask for the messages, where the ComfyUI server runs. The answer is read only."""
    server = running_server()
    if server is None:
        return
    from aiohttp import web  # the server's own library

    @server.routes.get(f"/{ROUTE}")
    async def messages(request: web.Request) -> web.Response:
        return web.json_response(answer(dict(request.rel_url.query)))


def _of_running_node() -> tuple[str | None, dict[str, str]]:
    """Return the node that runs, None outside a prompt, and what it has said: text -> level.

    At the first call in a new prompt, drop the messages of the earlier one.
    """
    global _said
    prompt, node = running_node()
    if _said[0] != prompt:
        _said = (prompt, {})
    return node, _said[1].setdefault(node, {})


def _show(node: str | None, messages: dict[str, str]) -> None:
    """Keep the messages of a node, and show them on it, where the ComfyUI server runs."""
    server, prompt = running_server(), running_prompt()
    if node is None or server is None:
        return
    kept = list(messages.items())
    changed = said.keep(prompt, node, kept)
    client = getattr(server, "client_id", None)  # the page that queued the prompt
    if client in _pages:
        if not changed:
            return
        workflow = _workflow(_queued(_said[0])[1])
        about = {"node": node, "workflow": workflow, "messages": kept}
        server.send_sync(EVENT, {**about, "type": prompt.get(node, {}).get("class_type")}, client)
    elif messages:
        _shown.add(node)
        server.send_progress_text("\n".join(messages), node, client)
    elif node in _shown:
        _shown.discard(node)
        server.send_progress_text(NOTHING, node, client)


def _queued(prompt_id: str | None, workflow_id: str | None = None) -> tuple[Prompt, dict]:
    """Return a prompt that runs or has run, and its extra data; both empty if there is none.

    Without the id of a prompt, the latest of a workflow is returned.
    """
    queue = getattr(running_server(), "prompt_queue", None)
    if queue is None:
        return {}, {}
    with queue.mutex:
        items = [*(entry["prompt"] for entry in queue.history.values())]
        items += queue.currently_running.values()
    for _, each, prompt, extra, *_ in reversed(items):
        wanted = each == prompt_id if prompt_id else workflow_id and _workflow(extra) == workflow_id
        if wanted:
            return prompt, extra
    return {}, {}


def _workflow(extra: dict) -> str | None:
    """Return the id of the workflow that a prompt was made from, in a prompt's extra data."""
    try:
        return extra["extra_pnginfo"]["workflow"]["id"]
    except (KeyError, TypeError):  # queued by a script
        return None
