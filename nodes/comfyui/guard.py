"""Guard what ComfyUI calls: errors can be printed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ...gmflow_core.files.errors import make_printable


def guarded(function: Callable) -> Callable:
    """Return the function, with errors that every log can print.

    ComfyUI logs the messages of an error and of those that led to it. A message with a lone
    surrogate, as a file's name or a text may hold one, would end the thread that runs prompts.
    It is for functions that ComfyUI calls outside of a node: samplers, guiders, wrappers.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            make_printable(error)
            raise

    return call
