"""Small random models in place of those that a workflow would have to download."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.diffusers_folder import random_model, write_published_folder
from tests.helpers import normal

LABELS = {
    88: "macaw",
    207: "golden retriever",
    279: "Arctic fox, white fox, Alopex lagopus",
    980: "volcano",
}


def write_imagenet_stand_ins(base: Path) -> None:
    """What workflows/imagenet_256.json names, into models/ of a base directory: the published model's folder, and a VAE. The
    VAE is one that the stock loader takes under any name and that is small: a tiny autoencoder (TAESD), whose 32 x 32 latents
    are 256 x 256 images too. What is there stays as it is."""
    models = base / "models"
    vae = models / "vae" / "vae-ft-ema-560000-ema-pruned.safetensors"
    if vae.exists():
        return
    labels = {str(label): LABELS.get(label, f"class {label}") for label in range(1000)}
    write_published_folder(
        models / "gmflow" / "gmflow_imagenet_k8_ema",
        random_model(num_classes=1000, latent_size=32),
        labels=labels,
    )
    vae.parent.mkdir(exist_ok=True)
    save_file(tiny_autoencoder(), vae)


def tiny_autoencoder() -> dict[str, Tensor]:
    """Random weights of a TAESD."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, 3, 3)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def block(name: str) -> None:
        for layer in (0, 2, 4):
            convolution(f"{name}.conv.{layer}", 64, 64)

    encoder, decoder = "taesd_encoder", "taesd_decoder"
    convolution(f"{encoder}.0", 3, 64)
    block(f"{encoder}.1")
    convolution(f"{decoder}.1", 4, 64)
    for stage in range(3):
        convolution(f"{encoder}.{2 + 4 * stage}", 64, 64, bias=False)
        convolution(f"{decoder}.{7 + 5 * stage}", 64, 64, bias=False)
        for i in range(3):
            block(f"{encoder}.{3 + 4 * stage + i}")
            block(f"{decoder}.{3 + 5 * stage + i}")
    convolution(f"{encoder}.14", 64, 4)
    block(f"{decoder}.18")
    convolution(f"{decoder}.19", 64, 3)
    weights = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return {
        name: weight / weight[0].numel() ** 0.5 if weight.ndim > 1 else torch.zeros_like(weight)
        for name, weight in weights.items()
    }
