"""What nodes have said, kept for as long as ComfyUI may keep their results.

A result that ComfyUI has kept is shown again without a run of its node, and so must be what the
node said when it made it. A result depends on the node and on all before it, and a message is kept
by these: the same part of a prompt finds it again, whichever prompt it is in.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable

from .graph import Prompt, before

MOST_KEPT = 2000  # nodes whose messages are kept
Message = tuple[str, str]  # text, level (info or warning)

# Module state, as ComfyUI keeps no place for it: node classes have no instances.
_kept: OrderedDict[tuple[str, str], list[Message]] = OrderedDict()
_lock = threading.Lock()  # the page asks while a prompt runs


def keep(prompt: Prompt, node: str, messages: Iterable[Message]) -> bool:
    """Keep what a node of a prompt has said, in the place of what it said before.

    Returns:
        True if that is something else.
    """
    if node not in prompt:
        return False
    key, messages = (node, _digest(prompt, node)), list(messages)
    with _lock:
        former = _kept.pop(key, [])
        if messages:
            _kept[key] = messages
        while len(_kept) > MOST_KEPT:
            _kept.popitem(last=False)
    return former != messages


def recall(prompt: Prompt) -> dict[str, list[Message]]:
    """Return what the nodes of a prompt said when they were last run as they are in it."""
    with _lock:
        nodes = {node for node, _ in _kept}
    keys = {(node, _digest(prompt, node)) for node in nodes if node in prompt}
    with _lock:
        return {key[0]: list(_kept[key]) for key in keys if key in _kept}


def _digest(prompt: Prompt, node: str) -> str:
    """Return a digest of the part of a prompt that a node's result depends on."""
    part = {
        each: [prompt[each].get("class_type"), prompt[each].get("inputs")]
        for each in before(prompt, node)
    }
    text = json.dumps(part, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
