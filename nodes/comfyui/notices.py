"""Messages of a node that runs: in the log, and on the node in the page."""

from __future__ import annotations

import logging
import sys

from comfy_execution.utils import get_executing_context

from ...gmflow_core.files.errors import printable

NOTHING = " "  # the page ignores an empty text
# Module state, as ComfyUI keeps no place for what a node has said: node classes have no instances,
# and one prompt runs at a time.
_said: tuple[str | None, dict] = (None, {})  # prompt that runs, its (node, message) in order
_shown: set[str] = set()  # nodes that have a text on them


def notice(message: str, level: int = logging.WARNING) -> None:
    """Log a message, and show it on the node that runs, once for each run of the node."""
    message, node = printable(message), _running_node()
    if (node, message) in _said[1]:
        return
    _said[1][node, message] = True
    logging.log(level, "GMFlow: %s", message)
    _show(node, "\n".join(text for at, text in _said[1] if at == node))


def clear() -> None:
    """Remove from the node that runs the messages of an earlier prompt."""
    node = _running_node()
    if node in _shown and not any(at == node for at, _ in _said[1]):
        _show(node, NOTHING)
        _shown.discard(node)


def _running_node() -> str | None:
    """Return the id of the node that runs; None outside a prompt.

    At the first call in a new prompt, drop the messages of the earlier one.
    """
    global _said
    context = get_executing_context()
    prompt, node = (context.prompt_id, context.node_id) if context is not None else (None, None)
    if _said[0] != prompt:
        _said = (prompt, {})
    return node


def _show(node: str | None, text: str) -> None:
    """Show a text on a node, where the ComfyUI server runs."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if node is not None and server is not None:
        _shown.add(node)
        server.send_progress_text(text, node)
