"""The prompt that runs: which nodes are in it, so that advice can name them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import Any

from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context

from ...gmflow_core.files.errors import printable

MOST_NAMED = 40  # characters of a node's title
Prompt = dict[str, dict[str, Any]]  # node id -> class_type, inputs, _meta


def running_node() -> tuple[str | None, str | None]:
    """Return the ids of the prompt and of the node that run; None for both outside a prompt.

    A node that another one made while it ran has no place in the page: its id is that of its maker.
    """
    context = get_executing_context()
    if context is None:
        return None, None
    state = get_progress_state()
    if state.prompt_id == context.prompt_id and context.node_id not in running_prompt():
        try:
            return context.prompt_id, state.dynprompt.get_display_node_id(context.node_id)
        except Exception:  # noqa: S110  a node that this version of ComfyUI keeps no record of
            pass
    return context.prompt_id, context.node_id


def running_prompt() -> Prompt:
    """Return the prompt that runs, as it was queued; it is empty outside a prompt."""
    context, state = get_executing_context(), get_progress_state()
    if context is None or state.prompt_id != context.prompt_id:
        return {}
    return state.dynprompt.get_original_prompt()


def closest(setting: str, of: Collection[str] = (), but: Collection[str] = ()) -> str | None:
    """Return the name of the node that runs, or of the closest one before it, with a setting.

    Args:
        setting: id of an input that the node has.
        of: the node classes that count; all if empty.
        but: node classes that do not count.

    Returns:
        the node's title in the page, in quotes, as it may hold anything; None if there is no such
        node, or outside a prompt.
    """
    prompt = running_prompt()
    for node in _upstream(prompt, running_node()[1]):
        kind = prompt[node].get("class_type")
        known = setting in (prompt[node].get("inputs") or {})
        if known and (not of or kind in of) and kind not in but:
            return f"'{name_of(prompt[node])}'"
    return None


def connected(setting: str) -> str | None:
    """Return the title of the closest node that is connected to an input with the id `setting`.

    It is looked for at the node that runs, then at those before it, and is in quotes, as that of
    `closest`; None if there is none.
    """
    prompt = running_prompt()
    for node in _upstream(prompt, running_node()[1]):
        link = (prompt[node].get("inputs") or {}).get(setting)
        if is_link(link) and link[0] in prompt:
            return f"'{name_of(prompt[link[0]])}'"
    return None


def name_of(node: dict) -> str:
    """Return a node's title in the page; without one, the name of its class in the node library."""
    kind = node.get("class_type")
    # ComfyUI's own module, without which there is no page
    names = getattr(sys.modules.get("nodes"), "NODE_DISPLAY_NAME_MAPPINGS", {})
    title = (node.get("_meta") or {}).get("title") or names.get(kind) or kind
    return printable(" ".join(str(title).split()), MOST_NAMED)


def running_server():
    """Return the ComfyUI server; None where there is none, as in a script that imports nodes."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def is_link(value: object) -> bool:
    """Return whether an input in a prompt is a link: [node id, index of the output]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _upstream(prompt: Prompt, start: str | None) -> Iterator[str]:
    """Yield a node, then those that it depends on, the closest first."""
    waiting, seen = [start], {start}
    while waiting:
        node = waiting.pop(0)
        if node not in prompt:
            continue
        yield node
        for value in (prompt[node].get("inputs") or {}).values():
            if is_link(value) and value[0] not in seen:
                seen.add(value[0])
                waiting.append(value[0])


def before(prompt: Prompt, node: str) -> list[str]:
    """Return a node and all those that its result depends on."""
    return list(_upstream(prompt, node))
