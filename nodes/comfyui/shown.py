"""What a node shows on itself: a picture, and a text."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor


def shown_sheet(node: type[io.ComfyNode], picture: Tensor, text: str, **further: Any) -> dict:
    """Return the `ui` of a node output that shows a picture (H, W, 3), and a text below it.

    Args:
        further: values for scripts of the page, by name; each a list.
    """
    return {**ui.PreviewImage(picture[None], cls=node).as_dict(), "text": [text], **further}
