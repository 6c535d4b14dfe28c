"""Draw the pictures that stand beside the workflows in ComfyUI's list of templates.

    python -m tests.comfyui.thumbnails             # all of them, into workflows/
    python -m tests.comfyui.thumbnails "GMFlow 01" # those whose names begin so

A workflow that needs no download is run by a real ComfyUI and its thumbnail shows what came out. A
workflow whose models are not here gets a diagram, which says that it is one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .client import Comfy
from .server import running
from .stand_in_files import WORKFLOWS

SIDE, MARGIN, CAPTION = 400, 10, 34
BADGE = 36  # pixels at the top that the page covers with a badge on the left
DARK, LIGHT, ACCENT = (24, 26, 31), (235, 235, 235), (255, 176, 72)
STEPS = 4

# the number of a workflow without downloads -> its output nodes, each with a caption
RESULTS = {
    "00": {"5": "4 steps"},
    "01": {"5": "one step"},
    "02": {"5": "GM Sampler", "9": "KSampler, 4 steps"},
    "03": {"5": "cfg 4", "16": "probabilistic"},
    "04": {"13": "the noise", "9": "4 steps later"},
    "05": {"11": "without", "15": "autoguidance"},
    "06": {"10": "GM-ODE", "14": "GM-SDE"},
    "07": {"4": "the mixture inside"},
    "08": {"4": "samplers and steps"},
    "09": {"5": "variety of seeds"},
}
# the number of a workflow with downloads -> base model, what is special, card, steps
DIAGRAMS = {
    "10": ("FLUX.1 dev", "8-bit weights", "16 GB card", STEPS),
    "11": ("FLUX.1 dev", "fp8, stock loader", "16 GB card", STEPS),
    "12": ("FLUX.1 dev", "GGUF, 4 bit", "12 GB card", STEPS),
    "13": ("FLUX.1 dev", "image to image", "16 GB card", STEPS),
    "14": ("FLUX.1 dev", "inpainting", "16 GB card", 6),
    "15": ("FLUX.1 dev", "with LoRAs", "16 GB card", STEPS),
    "16": ("FLUX.1 dev", "beside KSampler", "16 GB card", STEPS),
    "17": ("Qwen-Image", "8-bit weights", "24 GB card", STEPS),
    "18": ("Qwen-Image", "fp8, stock loader", "24 GB card", STEPS),
    "19": ("ImageNet", "1000 classes, GM-DiT", "4 GB card", 32),
    "20": ("FLUX.1 dev", "mixture inspector", "16 GB card", STEPS),
    "21": ("Any model", "no adapter; here Qwen-Image", "24 GB card", 8),
    "22": ("Your model", "trained here, from prompts", "16 GB card", STEPS),
}


def number_of(workflow: str) -> str:
    """Return the two digits in a workflow's name."""
    return workflow.split()[1]


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font."""
    return ImageFont.load_default(size)


def write(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, size: int, colour=LIGHT) -> None:
    """Write a line of text with its middle at (x, y)."""
    draw.text((x, y), text, fill=colour, font=font(size), anchor="mm")


def result_thumbnail(pictures: list[tuple[str, Image.Image]]) -> Image.Image:
    """Return the pictures, or the same left part of each, side by side with their captions."""
    canvas = Image.new("RGB", (SIDE, SIDE), DARK)
    draw = ImageDraw.Draw(canvas)
    width = (SIDE - MARGIN * (len(pictures) - 1)) // len(pictures)
    height = SIDE - CAPTION
    for place, (caption, picture) in enumerate(pictures):
        left = place * (width + MARGIN)
        scaled = ImageOps.contain(picture.convert("RGB"), (SIDE, height), Image.Resampling.LANCZOS)
        part = scaled.crop((0, 0, min(width, scaled.width), scaled.height))
        canvas.paste(part, (left + (width - part.width) // 2, (height - part.height) // 2))
        write(draw, left + width // 2, SIDE - CAPTION // 2, caption, 18)
    return canvas


def scene(side: int) -> np.ndarray:
    """Return a drawn picture of a sun above hills, in [0, 1], of shape (side, side, 3)."""
    large = Image.new("RGB", (4 * side, 4 * side), (74, 120, 190))
    draw, unit = ImageDraw.Draw(large), 4 * side / 100
    draw.ellipse([58 * unit, 14 * unit, 84 * unit, 40 * unit], fill=(255, 205, 90))
    draw.ellipse([-40 * unit, 52 * unit, 70 * unit, 170 * unit], fill=(70, 128, 86))
    draw.ellipse([30 * unit, 64 * unit, 140 * unit, 180 * unit], fill=(44, 92, 70))
    return np.asarray(large.resize((side, side), Image.Resampling.LANCZOS), float) / 255


def diagram(base: str, special: str, card: str, steps: int) -> Image.Image:
    """Return a drawing of noise that becomes a picture in some steps, with the base's name."""
    canvas = Image.new("RGB", (SIDE, SIDE), DARK)
    draw = ImageDraw.Draw(canvas)
    write(draw, SIDE // 2, 52 + BADGE, base, 46)
    write(draw, SIDE // 2, 98 + BADGE, special, 26, ACCENT)
    tiles, gap = 5, 12
    side = (SIDE - 2 * MARGIN - (tiles - 1) * gap) // tiles
    top, picture = 150 + BADGE, scene(side)
    noise = np.random.default_rng(0).normal(0.5, 0.3, picture.shape)
    for tile in range(tiles):
        sigma = 1 - tile / (tiles - 1)
        mixed = (1 - sigma) * picture + sigma * noise
        left = MARGIN + tile * (side + gap)
        pixels = (mixed.clip(0, 1) * 255).astype(np.uint8)
        canvas.paste(Image.fromarray(pixels), (left, top))
        if tile:
            middle = top + side // 2
            tip = [(left - 9, middle - 5), (left - 9, middle + 5), (left - 2, middle)]
            draw.polygon(tip, fill=ACCENT)
    write(draw, SIDE // 2, 294, f"{steps} steps", 40)
    write(draw, SIDE // 2, 338, f"{card} (computed)", 24)
    write(draw, SIDE // 2, 374, "diagram, not a result", 16, (150, 150, 150))
    return canvas


def result_of(comfy: Comfy, workflow: str) -> Image.Image:
    """Return the thumbnail of a workflow, from a run."""
    prompt = json.loads((WORKFLOWS / "api" / f"{workflow}.json").read_text(encoding="utf-8"))
    images = comfy.run(prompt, timeout=900).images
    nodes = RESULTS[number_of(workflow)]
    return result_thumbnail([(caption, images[node][0]) for node, caption in nodes.items()])


def main() -> None:
    """Draw the thumbnails of the workflows whose names begin so, or of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("begin", nargs="?", default="", help="of the workflows' names")
    begin = parser.parse_args().begin
    names = sorted(path.stem for path in WORKFLOWS.glob("*.json") if path.stem.startswith(begin))
    pictures = {}
    for name in names:
        if number_of(name) in DIAGRAMS:
            pictures[name] = diagram(*DIAGRAMS[number_of(name)])
    if missing := [name for name in names if number_of(name) in RESULTS]:
        with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as comfy:
            pictures |= {name: result_of(comfy, name) for name in missing}
    for name, picture in pictures.items():
        picture.save(WORKFLOWS / f"{name}.jpg", quality=88)
        print(WORKFLOWS / f"{name}.jpg")


if __name__ == "__main__":
    main()
