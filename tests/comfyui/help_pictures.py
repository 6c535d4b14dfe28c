"""Make the pictures of the nodes' help pages, web/docs/images: nodes in the page, and results.

``python -m tests.comfyui.help_pictures`` makes all of them, in some minutes on two cores; with
names of nodes or results it makes those only.
"""

from __future__ import annotations

import argparse
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from .client import Comfy
from .installation import REPOSITORY
from .page import ComfyPage, open_page
from .server import running
from .stand_in_files import write_stand_ins

IMAGES = REPOSITORY / "web" / "docs" / "images"
LANGUAGES = {"en": "", "zh": ".zh"}  # and what the names of their pictures end with
GAP = 20  # between pictures of one row
CUSTOM = "SamplerCustomAdvanced"
DIGITS = {"model_name": "digits_k8.safetensors"}
ADAPTER = {"adapter_name": "gmflux_k8_piid_4step.safetensors"}
CLASSES = [(0, "positive"), (2, "latent_image")]
FLUX = {"unet_name": "flux1-dev.safetensors"}


class Example(NamedTuple):
    """Two nodes of the page, by type, and the (output, input) that each link joins."""

    left: str
    right: str
    links: list[tuple[int, str]]
    settings: dict[str, Any] = {}


EXAMPLES = {
    "GMFlowAdaptedModel": Example(
        "GMFlowAdaptedModel",
        "GMFlowSampler",
        [(0, "model")],
        {**ADAPTER, "model_name": FLUX["unet_name"]},
    ),
    "GMFlowAdapter": Example("GMFlowAdapter", "GMFlowSampler", [(0, "model")], ADAPTER),
    "GMFlowAdapterInfo": Example("GMFlowAdapterInfo", "PreviewAny", [(0, "source")], ADAPTER),
    "GMFlowAutoguidance": Example("GMFlowAutoguidance", CUSTOM, [(0, "guider")]),
    "GMFlowClassLabels": Example(
        "GMFlowClassLabels",
        "GMFlowSampler",
        CLASSES,
        {"label": "0", "more_labels": "1\n2\n3\n4\n5\n6\n7\n8\n9", "repeat": 10},
    ),
    "GMFlowCompare": Example("GMFlowClassLabels", "GMFlowCompare", CLASSES),
    "GMFlowDensity": Example("GMFlowSampler", "GMFlowDensity", [(0, "samples")]),
    "GMFlowGuider": Example("GMFlowGuider", CUSTOM, [(0, "guider")]),
    "GMFlowInspector": Example("GMFlowClassLabels", "GMFlowInspector", CLASSES),
    "GMFlowLoadDiffusionModel8bit": Example(
        "GMFlowLoadDiffusionModel8bit", "GMFlowAdapter", [(0, "model")], {**FLUX, **ADAPTER}
    ),
    "GMFlowLoader": Example("GMFlowLoader", "GMFlowSampler", [(0, "model")], DIGITS),
    "GMFlowODESampler": Example("GMFlowODESampler", CUSTOM, [(0, "sampler")]),
    "GMFlowPiFlowSampler": Example("GMFlowAdapter", "GMFlowPiFlowSampler", [(0, "model")], ADAPTER),
    "GMFlowPixels": Example("GMFlowSampler", "GMFlowPixels", [(0, "samples")], {"columns": 10}),
    "GMFlowPolicySampler": Example("GMFlowPolicySampler", CUSTOM, [(0, "sampler")]),
    "GMFlowPolicySigmas": Example("GMFlowPolicySigmas", CUSTOM, [(0, "sigmas")]),
    "GMFlowProbabilisticGuidance": Example(
        "GMFlowProbabilisticGuidance",
        "KSampler",
        [(0, "model")],
        {"cfg": 0.2, "steps": 8, "scheduler": "simple"},
    ),
    "GMFlowSDESampler": Example("GMFlowSDESampler", CUSTOM, [(0, "sampler")]),
    "GMFlowSampler": Example("GMFlowSampler", "GMFlowPixels", [(0, "samples")]),
    "GMFlowSaveDiffusionModel8bit": Example(
        "GMFlowLoadDiffusionModel8bit", "GMFlowSaveDiffusionModel8bit", [(0, "model")], FLUX
    ),
    "GMFlowSeedSpread": Example("GMFlowClassLabels", "GMFlowSeedSpread", CLASSES),
    "GMFlowSigmas": Example("GMFlowSigmas", CUSTOM, [(0, "sigmas")], {"steps": 4}),
    "GMFlowSourceLoader": Example("GMFlowSourceLoader", "GMFlowSourceNoise", [(0, "source")]),
    "GMFlowSourceNoise": Example(
        "GMFlowSourceNoise",
        CUSTOM,
        [(0, "noise"), (2, "latent_image")],
        {"choice": "from the list", "modes": "3, 7, 20, 41"},
    ),
    "GMFlowSpread": Example("GMFlowSpread", "GMFlowSampler", [(0, "model")], {"spread": 0.7}),
    "GMFlowTrainAdapter": Example("GMFlowTrainAdapter", "GMFlowSampler", [(0, "model")]),
    "GMFlowUnconditional": Example(
        "GMFlowUnconditional", "KSampler", [(0, "positive"), (0, "negative")], {"cfg": 1.0}
    ),
}

DRAW = """
({left, right, links, settings, subject}) => {
    const {app, LiteGraph} = window, START = 200, TALLEST = 520;
    app.graph.clear();
    const nodes = [left, right].map((type) => LiteGraph.createNode(type));
    let y = START;
    for (const node of nodes) {
        node.id = window.helpNodes = (window.helpNodes ?? 1000) + 1;  // values are kept by id
        app.graph.add(node);
        const whole = node.type === subject;
        if (!whole) node.collapse();
        node.pos = [whole ? START : START + 60, y];
        y += (whole ? node.size[1] : 0) + 80;
        for (const widget of node.widgets ?? [])
            if (widget.name in settings) widget.value = settings[widget.name];
    }
    for (const [output, input] of links)
        nodes[0].connect(output, nodes[1], nodes[1].findInputSlot(input));
    app.canvas.deselectAll();
    const scale = Math.min(1, TALLEST / (y - START));  // what is out of sight is not drawn
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [150 / scale - START, 150 / scale - START];
    app.canvas.setDirty(true, true);
    return null;
}
"""
BOX = """
() => {
    const [a, b] = window.app.graph.nodes.map((node) => node.getBounding());
    const canvas = document.querySelector('#graph-canvas').getBoundingClientRect();
    const {scale, offset: [dx, dy]} = window.app.canvas.ds;
    const left = Math.min(a[0], b[0]), top = Math.min(a[1], b[1]);
    const right = Math.max(a[0] + a[2], b[0] + b[2]), bottom = Math.max(a[1] + a[3], b[1] + b[3]);
    return {x: canvas.left + scale * (left + dx) - 16,
            y: canvas.top + scale * (top + dy) - 32,  // below a badge
            width: scale * (right - left) + 32, height: scale * (bottom - top) + 48};
}
"""


def nodes_of(page: ComfyPage, name: str) -> Image.Image:
    """Return a picture of a node, with its example's other one folded, as the page draws them."""
    page.page.evaluate(DRAW, {**EXAMPLES[name]._asdict(), "subject": name})
    page.page.wait_for_timeout(700)  # the page draws them meanwhile
    picture = page.page.screenshot(clip=page.page.evaluate(BOX))
    return Image.open(BytesIO(picture)).convert("RGB")


def row(pictures: list[Image.Image], rows: int = 1) -> Image.Image:
    """Return pictures of one size side by side on white, row after row."""
    width, height = pictures[0].size
    columns = len(pictures) // rows
    size = (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    for place, picture in enumerate(pictures):
        down, across = divmod(place, columns)
        sheet.paste(picture, (across * (width + GAP), down * (height + GAP)))
    return sheet


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """Return a node of a prompt."""
    return {"class_type": kind, "inputs": inputs}


def pixels(samples: list, columns: int = 5) -> dict[str, Any]:
    """Return the nodes that show samples as a sheet of digits."""
    view = node("GMFlowPixels", samples=samples, scale=6, columns=columns)
    return {"view": view, "save": node("PreviewImage", images=["view", 0])}


def digits(**sampler: Any) -> dict[str, Any]:
    """Return a prompt for two rows of digits, 0 to 9; GM Sampler gets these settings."""
    settings = {"seed": 0, "steps": 8, "solver": "gm-ode", "order": 2, "substeps": 16, "shift": 1.0}
    numbers = "\n".join("123456789")
    links = {"model": ["model", 0], "positive": ["class", 0], "latent_image": ["class", 2]}
    return {
        "model": node("GMFlowLoader", **DIGITS),
        "class": node("GMFlowClassLabels", model=["model", 0], label="0", more_labels=numbers),
        "sample": node("GMFlowSampler", denoise=1.0, **links, **settings, **sampler),
        **pixels(["sample", 0]),
    }


def steps(comfy: Comfy) -> Image.Image:
    """Return digits at 1, 2, 4 and 8 steps, of the same noise."""
    settings = ({"steps": count, "substeps": max(8, 32 // count)} for count in (1, 2, 4, 8))
    prompts = []
    for each in settings:
        prompts.append(digits())
        prompts[-1]["sample"]["inputs"].update(each)
    return row([comfy.run(prompt, 600).image for prompt in prompts], 2)


def guidance(comfy: Comfy) -> Image.Image:
    """Return digits at four weights of guidance, of the same noise."""
    weights = (0.0, 0.05, 0.2, 0.45)
    return row([comfy.run(digits(guidance=weight), 600).image for weight in weights], 2)


def autoguidance(comfy: Comfy) -> Image.Image:
    """Return digits at three scales; the guide has 90 % of the model's weights."""
    pictures = []
    for scale in (1.0, 2.0, 4.0):
        prompt = digits()
        model, links = ["model", 0], {"guider": ["guide", 0], "latent_image": ["class", 2]}
        prompt |= {
            "zero": node("ModelMergeSubtract", model1=model, model2=model, multiplier=1.0),
            "weak": node("ModelMergeSimple", model1=model, model2=["zero", 0], ratio=0.9),
            "guide": node(
                "GMFlowAutoguidance",
                model=model,
                guide=["weak", 0],
                positive=["class", 0],
                scale=scale,
                start_percent=0.0,
                end_percent=1.0,
            ),
            "noise": node("RandomNoise", noise_seed=0),
            "solver": node("GMFlowODESampler", order=2, substeps=16),
            "sigmas": node("GMFlowSigmas", steps=8, shift=1.0, denoise=1.0),
        }
        parts = {name: [name, 0] for name in ("noise", "sigmas")}
        prompt["sample"] = node(CUSTOM, sampler=["solver", 0], **parts, **links)
        pictures.append(comfy.run(prompt, 600).image)
    return row(pictures)


def modes(comfy: Comfy) -> Image.Image:
    """Return the noise of four modes, and below it three pictures of each."""
    source = {"source": ["source", 0], "batch_size": 12, "modes": "3, 7, 20, 41"}
    prompt = {
        "model": node("GMFlowLoader", model_name="digits_modes_k8.safetensors"),
        "source": node("GMFlowSourceLoader", source_name="digits_source.safetensors"),
        "noise": node("GMFlowSourceNoise", noise_seed=0, choice="from the list", **source),
        "start": node("GMFlowSigmas", steps=1, shift=1.0, denoise=1.0),
        "sample": node(
            "AddNoise",
            model=["model", 0],
            noise=["noise", 0],
            sigmas=["start", 0],
            latent_image=["noise", 2],
        ),
        **pixels(["sample", 0], 4),
    }
    noise = comfy.run(prompt, 600).image
    prompt["guider"] = node("BasicGuider", model=["model", 0], conditioning=["noise", 1])
    prompt["solver"] = node("GMFlowODESampler", order=2, substeps=8)
    prompt["sigmas"] = node("GMFlowSigmas", steps=8, shift=1.0, denoise=1.0)
    parts = {name: [name, 0] for name in ("noise", "guider", "sigmas")}
    prompt["sample"] = node(CUSTOM, sampler=["solver", 0], latent_image=["noise", 2], **parts)
    drawn = comfy.run(prompt, 600).image
    first = noise.crop((0, 0, noise.width, 4 + 52))
    sheet = Image.new("RGB", (drawn.width, first.height + GAP + drawn.height), "white")
    sheet.paste(first, (0, 0))
    sheet.paste(drawn, (0, first.height + GAP))
    return sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST)


def bins(comfy: Comfy) -> Image.Image:
    """Return the density of the same 65,536 points at three numbers of bins."""
    settings = {"seed": 0, "steps": 4, "solver": "gm-ode", "order": 2, "substeps": 8, "shift": 1.0}
    links = {"model": ["model", 0], "latent_image": ["empty", 0]}
    view = {"size": 256, "extent": 4.4, "outline": False, "merge_batch": True}
    prompt = {
        "model": node("GMFlowLoader", model_name="checkerboard_k64.safetensors"),
        "empty": node("EmptyLatentImage", width=1024, height=1024, batch_size=4),
        "sample": node("GMFlowSampler", denoise=1.0, **links, **settings),
        "save": node("PreviewImage", images=["view", 0]),
    }
    pictures = []
    for count in (32, 128, 512):
        prompt["view"] = node("GMFlowDensity", samples=["sample", 0], bins=count, **view)
        pictures.append(comfy.run(prompt, 600).image)
    return row(pictures)


RESULTS = {each.__name__: each for each in (steps, guidance, autoguidance, modes, bins)}


def save(picture: Image.Image, name: str, **options: Any) -> None:
    """Save a picture for the help pages."""
    path = IMAGES / f"{name}.webp"
    picture.convert("RGB").save(path, method=6, **options)
    print(f"{path.relative_to(REPOSITORY)}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Make the pictures that the command line names, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="of nodes or results (all)")
    asked = parser.parse_args().names or [*RESULTS, *EXAMPLES]
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as comfy:
        for name in (name for name in asked if name in RESULTS):
            save(RESULTS[name](comfy), name, lossless=name != "bins", quality=70)
        loaders = [node("UNETLoader", **FLUX), node("GMFlowAdapter", **ADAPTER)]
        write_stand_ins(comfy.base, dict(enumerate(loaders)))
        for language, end in LANGUAGES.items():
            names = [name for name in asked if name in EXAMPLES]
            comfy.post("/settings", {"Comfy.Locale": language})
            if names:
                with open_page(comfy) as page:
                    for name in names:
                        save(nodes_of(page, name), f"{name}{end}", quality=60)


if __name__ == "__main__":
    main()
