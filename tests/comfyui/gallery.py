"""Make README's first picture, and those of its gallery, each with its workflow inside.

    python -m tests.comfyui.gallery             # all of them, into docs/gallery/ and docs/
    python -m tests.comfyui.gallery "GMFlow 07" # those of the workflows whose names begin so

A real ComfyUI runs the workflows that need no download. Dropped onto ComfyUI's page, a picture
opens the workflow that made it. The first picture is of that page itself, in Chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image

from .client import Comfy
from .installation import REPOSITORY
from .page import open_page
from .server import running
from .stand_in_files import WORKFLOWS
from .thumbnails import RESULTS, number_of

GALLERY = REPOSITORY / "docs" / "gallery"
PAGE, PAGE_SIZE = REPOSITORY / "docs" / "comfyui.jpg", {"width": 1400, "height": 920}
OPENED = "00"  # the number of the workflow in the picture of the page
# leave the top to the page's own buttons, and show the whole graph below them
FIT = """(size) => {
    const { canvas } = window.app;
    const nodes = canvas.graph.nodes.map((node) => node.getBounding());
    const boxes = [...nodes, ...canvas.graph.groups.map((group) => group._bounding)];
    const [left, top] = [0, 1].map((i) => Math.min(...boxes.map((box) => box[i])));
    const [right, bottom] = [0, 1].map((i) => Math.max(...boxes.map((box) => box[i] + box[i + 2])));
    const [width, height] = [size.width - 110, size.height - 125];
    const scale = Math.min(1, width / (right - left), height / (bottom - top));
    canvas.ds.scale = scale;
    canvas.ds.offset = [85 / scale - left, 100 / scale - top];
    canvas.setDirty(true, true);
}"""
SHOWN = ("00", "01", "06", "07", "08", "09")  # the numbers of the workflows


def picture_of(comfy: Comfy, workflow: str) -> Path:
    """Return the file of a workflow's last picture, as ComfyUI writes it for its page."""
    graph = json.loads((WORKFLOWS / f"{workflow}.json").read_text(encoding="utf-8"))
    prompt = json.loads((WORKFLOWS / "api" / f"{workflow}.json").read_text(encoding="utf-8"))
    result = comfy.wait(comfy.submit(prompt, extra_pnginfo={"workflow": graph}), timeout=900)
    last = list(RESULTS[number_of(workflow)])[-1]
    about = result.outputs[last]["images"][0]
    return comfy.base / about["type"] / about["subfolder"] / about["filename"]


def write_page_picture(comfy: Comfy, workflow: str) -> None:
    """Write a picture of ComfyUI's page in which a workflow has run."""
    comfy.post("/settings", {"Comfy.Graph.CanvasInfo": False})  # frames per second and the like
    with open_page(comfy) as page:
        page.page.set_viewport_size(PAGE_SIZE)
        page.drop_workflow(WORKFLOWS / f"{workflow}.json")
        page.run()
        page.wait_for_images(timeout=600)
        page.page.evaluate(FIT, PAGE_SIZE)
        page.page.wait_for_timeout(8000)  # the page draws, and takes its toasts away
        shot = page.page.screenshot()
    Image.open(BytesIO(shot)).convert("RGB").save(PAGE, quality=88, optimize=True)


def main() -> None:
    """Make the pictures of the workflows whose names begin so, or of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("begin", nargs="?", default="", help="of the workflows' names")
    begin = parser.parse_args().begin
    names = sorted(path.stem for path in WORKFLOWS.glob("*.json") if path.stem.startswith(begin))
    GALLERY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as comfy:
        for name in names:
            if number_of(name) in SHOWN:
                place = GALLERY / f"{number_of(name)}.png"
                shutil.copyfile(picture_of(comfy, name), place)
                print(place.relative_to(REPOSITORY))
            if number_of(name) == OPENED:
                write_page_picture(comfy, name)
                print(PAGE.relative_to(REPOSITORY))


if __name__ == "__main__":
    main()
