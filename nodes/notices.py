"""What a node has to say while it runs: in the log, and on the node in the page."""

from __future__ import annotations

import logging
import sys

from comfy_execution.utils import get_executing_context

_said: tuple[str | None, dict] = (None, {})  # of the prompt that runs: (node, message), in order


def notice(message: str, level: int = logging.WARNING) -> None:
    """Say it once for each run of a node; on the node itself where the ComfyUI server runs."""
    global _said
    context = get_executing_context()
    prompt, node = (context.prompt_id, context.node_id) if context is not None else (None, None)
    if _said[0] != prompt:
        _said = (prompt, {})
    if (node, message) in _said[1]:
        return
    _said[1][node, message] = True
    logging.log(level, "GMFlow: %s", message)
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if node is not None and server is not None:
        server.send_progress_text("\n".join(text for at, text in _said[1] if at == node), node)
