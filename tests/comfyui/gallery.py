"""Make the pictures of README's gallery, each with its workflow inside.

    python -m tests.comfyui.gallery             # all of them, into docs/gallery/
    python -m tests.comfyui.gallery "GMFlow 07" # those of the workflows whose names begin so

A real ComfyUI runs the workflows that need no download. Dropped onto ComfyUI's page, a picture
opens the workflow that made it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from .client import Comfy
from .installation import REPOSITORY
from .server import running
from .stand_in_files import WORKFLOWS
from .thumbnails import RESULTS, number_of

GALLERY = REPOSITORY / "docs" / "gallery"
SHOWN = ("01", "05", "06", "07", "08", "09")  # the numbers of the workflows


def picture_of(comfy: Comfy, workflow: str) -> Path:
    """Return the file of a workflow's last picture, as ComfyUI writes it for its page."""
    graph = json.loads((WORKFLOWS / f"{workflow}.json").read_text(encoding="utf-8"))
    prompt = json.loads((WORKFLOWS / "api" / f"{workflow}.json").read_text(encoding="utf-8"))
    result = comfy.wait(comfy.submit(prompt, extra_pnginfo={"workflow": graph}), timeout=900)
    last = list(RESULTS[number_of(workflow)])[-1]
    about = result.outputs[last]["images"][0]
    return comfy.base / about["type"] / about["subfolder"] / about["filename"]


def main(begin: str = "") -> None:
    """Make the pictures of the workflows whose names begin with `begin`."""
    names = sorted(path.stem for path in WORKFLOWS.glob("*.json") if path.stem.startswith(begin))
    GALLERY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as comfy:
        for name in names:
            if number_of(name) in SHOWN:
                place = GALLERY / f"{number_of(name)}.png"
                shutil.copyfile(picture_of(comfy, name), place)
                print(place.relative_to(REPOSITORY))


if __name__ == "__main__":
    main(*sys.argv[1:])
