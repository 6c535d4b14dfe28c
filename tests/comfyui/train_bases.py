"""Tiny random bases of every kind that adapters are trained for, and conditionings for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from .bases import (
    Shapes,
    linear,
    random_weights,
    write,
    write_flux,
    write_flux2,
    write_qwen_image,
)
from .plain_bases import lumina_shapes, sd3_shapes

TEXT_DIM, TEXT_LAYERS = 160, 3  # of Krea 2's text, here


@dataclass(frozen=True)
class Teacher:
    """A base model to train an adapter for.

    Args:
        latent: (C, *S) of a latent.
        text, pooled: widths of a conditioning; pooled None for none.
        guidance: distilled guidance; None for bases that take none.
    """

    latent: tuple[int, ...]
    text: int
    pooled: int | None = None
    guidance: float | None = None


IMAGE = (16, 8, 8)
TEACHERS = {
    "flux": Teacher(IMAGE, 4096, 768, 3.5),
    "qwen": Teacher((16, 1, 8, 8), 3584),
    "flux2": Teacher((128, 4, 4), 15360, None, 4.0),
    "lumina": Teacher(IMAGE, 2560),
    "krea2": Teacher((16, 1, 8, 8), TEXT_DIM * TEXT_LAYERS),
    "sd3": Teacher(IMAGE, 4096, 2048),
}


def write_teacher(folder: Path, kind: str) -> Path:
    """Write a base of a kind, in float32, into a folder."""
    path, size = folder / f"{kind}.safetensors", {"dtype": torch.float32, "depth": 1}
    if kind == "flux":
        return write_flux(path, single=1, **size)
    if kind == "qwen":
        return write_qwen_image(path, **size)
    if kind == "flux2":
        return write_flux2(path, single=1, **size)
    shapes = {"lumina": lumina_shapes, "krea2": krea2_shapes, "sd3": sd3_shapes}[kind]()
    return write(path, random_weights(shapes, seed=0, dtype=torch.float32))


def krea2_shapes(features: int = 256, layers: int = 2) -> Shapes:
    """Return names and shapes of Krea 2's weights, whose heads have 128 channels."""
    shapes: Shapes = {}
    linear(shapes, "first", 64, features)
    linear(shapes, "tmlp.0", 256, features)
    linear(shapes, "tmlp.2", features, features)
    linear(shapes, "tproj.1", features, 6 * features)
    shapes["txtmlp.0.scale"] = (TEXT_DIM,)
    linear(shapes, "txtmlp.1", TEXT_DIM, features)
    linear(shapes, "txtmlp.3", features, features)
    shapes["txtfusion.projector.weight"] = (1, TEXT_LAYERS)
    for part in ("layerwise_blocks", "refiner_blocks"):
        for i in range(2):
            krea2_block(shapes, f"txtfusion.{part}.{i}", TEXT_DIM, TEXT_DIM // 20)
    for i in range(layers):
        krea2_block(shapes, f"blocks.{i}", features, 128)
        shapes[f"blocks.{i}.mod.lin"] = (6 * features,)
    shapes["last.norm.scale"] = (features,)
    shapes["last.modulation.lin"] = (2, features)
    linear(shapes, "last.linear", features, 64)
    return shapes


def krea2_block(shapes: Shapes, name: str, width: int, head: int) -> None:
    """Add the weights of one of Krea 2's blocks."""
    wide = 128 * -(-int(2 * width / 3) * 4 // 128)
    for part in ("wq", "wk", "wv", "wo", "gate"):
        linear(shapes, f"{name}.attn.{part}", width, width, bias=False)
    for part in ("qnorm", "knorm"):
        shapes[f"{name}.attn.qknorm.{part}.scale"] = (head,)
    for part, sizes in {"gate": (width, wide), "up": (width, wide), "down": (wide, width)}.items():
        linear(shapes, f"{name}.mlp.{part}", *sizes, bias=False)
    shapes[f"{name}.prenorm.scale"] = shapes[f"{name}.postnorm.scale"] = (width,)
