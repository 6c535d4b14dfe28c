"""What a node has to say while it runs: in the log, and on the node in the page."""

from __future__ import annotations

import logging

from comfy_execution.utils import get_executing_context

_said: tuple[str | None, set] = (None, set())  # of the prompt that runs


def notice(message: str, level: int = logging.WARNING) -> None:
    """Say it once for each run of a node; on the node itself where the ComfyUI server runs."""
    global _said
    context = get_executing_context()
    prompt, node = (context.prompt_id, context.node_id) if context is not None else (None, None)
    if _said[0] != prompt:
        _said = (prompt, set())
    if (node, message) in _said[1]:
        return
    _said[1].add((node, message))
    logging.log(level, "GMFlow: %s", message)
    from server import PromptServer  # here, as no server needs to exist

    server = getattr(PromptServer, "instance", None)
    if node is not None and server is not None:
        shown = [text for at, text in _said[1] if at == node]
        server.send_progress_text("\n".join(sorted(shown, key=lambda text: text != message, reverse=True)), node)
