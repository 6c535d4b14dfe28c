"""The nodes' names and tooltips for the page's languages: locales/LANGUAGE/nodeDefs.json.

The schemas are the one source of English; ``python -m tests.comfyui.locale_files`` writes
locales/en from a running ComfyUI. locales/zh is written by hand.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from .installation import REPOSITORY
from .server import running

LOCALES = REPOSITORY / "locales"


def own_nodes(object_info: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of ``/object_info`` that are nodes of this extension."""
    return {
        name: about
        for name, about in sorted(object_info.items())
        if about["python_module"] == "custom_nodes.gmflow"
    }


def english(node: dict[str, Any]) -> dict[str, Any]:
    """Return the names and tooltips of a node's entry in ``/object_info``, in locales' layout."""
    inputs = {}
    for name, (_, *options) in [
        each for group in ("required", "optional") for each in node["input"].get(group, {}).items()
    ]:
        about = options[0] if options else {}
        inputs[name] = {"name": about.get("display_name", name), "tooltip": about.get("tooltip")}
    tooltips = node["output_tooltips"] or [None] * len(node["output"])
    outputs = {
        str(place): {"name": name, "tooltip": tooltip}
        for place, (name, tooltip) in enumerate(zip(node["output_name"], tooltips, strict=True))
    }
    about = {"display_name": node["display_name"], "description": node["description"]}
    about |= {"inputs": inputs} if inputs else {}
    return about | ({"outputs": outputs} if outputs else {})


def names(language: str) -> dict[str, Any]:
    """Return the nodes' names and tooltips in a language, as the page reads them."""
    return json.loads((LOCALES / language / "nodeDefs.json").read_text("utf-8"))


def as_text(content: dict[str, Any]) -> str:
    """Return the text of a file of names."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Write locales/en/nodeDefs.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    with tempfile.TemporaryDirectory() as base, running(Path(base)) as comfy:
        nodes = own_nodes(comfy.object_info())
    text = as_text({name: english(node) for name, node in nodes.items()})
    (LOCALES / "en" / "nodeDefs.json").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
