"""Door of the nodes' inputs: every node with values of wrong types, sizes and ranges.

Only for a process in which ComfyUI runs; see `inside_comfyui.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from random import Random
from typing import Any

import torch

import nodes

from ..children import Limits
from . import nodes_at_work as work
from .door import Door
from .node_files import NODES

LONG = "x" * 5000
PLAIN = (
    *(None, True, False, 0, 1, -1, 3, 10**6, 10**12, 10**30, -(10**30), 0.5, 1e308, math.nan),
    *(math.inf, -math.inf, "", " ", "x", "8", "nan", "\ud800", "a\0b", "\x1b[31m", LONG),
    *("../../etc/passwd", "/dev/zero", "/proc/self/mem", "file:///x", "~", "C:\\x", "a\nb"),
    *([], [None], [1], [[]], ["x", 0], {}, {"a": 1}, {"samples": None}, {"samples": [1]}),
)
TENSORS = (
    lambda: torch.zeros(()),
    lambda: torch.zeros(0),
    lambda: torch.zeros(3),
    lambda: torch.ones(1, 3, 8, 8),
    lambda: torch.full((1, 3, 8, 8), math.nan),
    lambda: torch.zeros(0, 3, 8, 8),
    lambda: torch.zeros(1, 2, 4, 4, dtype=torch.int64),
    lambda: torch.zeros(1, 2, 4, 4, dtype=torch.complex64),
    lambda: torch.zeros(1, 2, 4),
    lambda: torch.zeros(1, 16, 1, 4, 4),
    lambda: torch.zeros(1, 16, 2, 4, 4, 2),
    lambda: torch.tensor([0.0, 1.0]),
    lambda: torch.tensor([1.0, math.nan, 0.0]),
    lambda: torch.full((1, 2, 4, 4), math.inf),
)
MODELS = ("checkerboard", "digits", "modes")


def sound(name: str) -> dict[str, Any]:
    """Return sound inputs of a node: the defaults of its schema, and values for its links."""
    model = MODEL_OF.get(name, lambda: work.shipped("digits"))()
    links = {
        "MODEL": lambda: model,
        "LATENT": lambda: LATENT_OF.get(name, lambda: work.latent_of(model))(),
        "CONDITIONING": lambda: work.conditioning_of(model),
        "SIGMAS": lambda: torch.tensor([1.0, 0.5, 0.0]),
    }
    found = {}
    for entry in work.node_class(name).GET_SCHEMA().inputs:
        kind, default = entry.io_type, getattr(entry, "default", None)
        if entry.id in OWN.get(name, {}):
            found[entry.id] = OWN[name][entry.id]
        elif kind in links:
            found[entry.id] = links[kind]()
        elif kind == "COMBO":
            found[entry.id] = default if default is not None else entry.options[0]
        elif kind in ("INT", "FLOAT", "STRING", "BOOLEAN"):
            found[entry.id] = default
        elif not entry.optional:
            found[entry.id] = work.mixture_source()
    return found


MODEL_OF = {
    "GMFlowAdapter": lambda: work.base_model("flux"),
    "GMFlowAdapterInfo": lambda: work.base_model("flux"),
    "GMFlowPiFlowSampler": lambda: work.adapted("flux"),
    "GMFlowSaveDiffusionModel8bit": work.eight_bit,
}
LATENT_OF = {
    "GMFlowDensity": lambda: {"samples": torch.zeros(1, 2, 8, 8)},
    "GMFlowPixels": lambda: {"samples": torch.zeros(1, 3, 8, 8)},
}
OWN: dict[str, dict[str, Any]] = {
    "GMFlowLoader": {"model_name": "checkerboard_k64.safetensors"},
    "GMFlowSourceLoader": {"source_name": "digits_source.safetensors"},
    "GMFlowAdapter": {"adapter_name": "flux_4step.safetensors"},
    "GMFlowAdaptedModel": {
        "model_name": "tiny_flux.safetensors",
        "adapter_name": "flux_4step.safetensors",
    },
    "GMFlowAdapterInfo": {"adapter_name": "flux_4step.safetensors"},
    "GMFlowLoadDiffusionModel8bit": {"unet_name": "tiny_flux.safetensors"},
    "GMFlowClassLabels": {"label": "1", "more_labels": "2"},
}


def make(folder: Path) -> None:
    """Load what the nodes need, and check that they take it."""
    for base in ("flux", "qwen"):
        work.adapted(base)
    work.eight_bit()
    for name in names():
        outputs = work.call(name, **sound(name))
        work.use_outputs(outputs)


def names() -> list[str]:
    """Return the ids of the extension's nodes, but for the one that trains a model."""
    found = (name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith(NODES))
    return sorted(name for name in found if name != "GMFlowTrainAdapter")


def draw(rng: Random) -> tuple[str, Any, tuple[str, ...]]:
    """Draw a node and hostile inputs.

    Returns:
        What was drawn; node and inputs; the words of which a message must hold one.
    """
    name = rng.choice(names())
    cls = work.node_class(name)
    inputs, entries = sound(name), cls.GET_SCHEMA().inputs
    about, words = [], {cls.GET_SCHEMA().display_name}
    chosen = rng.sample(entries, min(len(entries), rng.choice((1, 1, 1, 2)))) if entries else []
    for entry in chosen:
        if entry.optional and rng.random() < 0.2:
            inputs.pop(entry.id, None)
            about.append(f"without {entry.id}")
        else:
            inputs[entry.id] = value = hostile(entry.io_type, rng)
            about.append(f"{entry.id} = {shown(value)}")
    for entry in entries:
        title = getattr(entry, "display_name", None) or entry.id
        words |= {entry.id, title, entry.io_type}
        words |= {"model", "source", "adapter"} if entry.io_type == "COMBO" else set()  # of a name
    return f"{name}: {', '.join(about)}", (name, inputs), tuple(sorted(words))


def hostile(kind: str, rng: Random) -> Any:
    """Return a value for an input: mostly of another type, or of wrong shape and numbers."""
    way = rng.random()
    if kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO") and way < 0.8:
        return rng.choice(PLAIN)
    tensor = rng.choice(TENSORS)()
    if kind == "LATENT" and way < 0.7:
        latent = {"samples": tensor}
        if rng.random() < 0.3:
            latent["noise_mask"] = rng.choice(TENSORS)()
        return latent
    if kind == "CONDITIONING" and way < 0.7:
        about = rng.choice(({}, {"pooled_output": None}, {"pooled_output": tensor}, None, [], "x"))
        return rng.choice(([[tensor, about]], [[tensor]], [tensor], [[None, about]], [[about]]))
    if kind == "MODEL" and way < 0.6:
        choice = rng.choice((*MODELS, "flux", "flux adapted", "qwen adapted", "8 bit"))
        return _model(choice)
    return rng.choice((*PLAIN, tensor, tensor, object(), work.mixture_source()))


def _model(choice: str) -> Any:
    """Return a sound MODEL, which may be of another kind than a node needs."""
    if choice in MODELS:
        return work.shipped(choice)
    if choice == "8 bit":
        return work.eight_bit()
    base = choice.split()[0]
    return work.adapted(base) if "adapted" in choice else work.base_model(base)


def shown(value: Any) -> str:
    """Return a short text for a value."""
    if isinstance(value, torch.Tensor):
        return f"tensor {value.dtype} {tuple(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(shown, value)) + "]"
    return ascii(value)[:80]


def use(folder: Path, given: Any) -> Any:
    """Run a node with the inputs, and use what it returns."""
    if given is None:
        return []
    name, inputs = given
    return work.use_outputs(work.call(name, **inputs))


def doors() -> list[Door]:
    """Return the door of this file."""
    return [Door("inputs of nodes", make, use, {}, 4, Limits(60, 1500), inputs=draw)]
