"""Decode samples to pictures, for the trainers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gmflow_core.models.vae import VAE
from training.data.shards import to_pixels
from training.encoders.load import load_vae
from training.encoders.rae import RAE


def load_decoder(
    name: str, device: torch.device, shape: tuple[int, ...] | None = None
) -> VAE | RAE:
    """Load the VAE or RAE that decodes samples.

    Args:
        name: --vae, or that of the data.
        shape: (C, h, w) of the samples; None for pixels and points, which need no decoder.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: as `load_vae` and `check_decodes`.
    """
    vae = load_vae(name, device)
    if shape is not None:
        check_decodes(vae, shape, name)
    return vae


def check_decodes(vae: VAE | RAE, shape: tuple[int, ...], name: str) -> None:
    """Check that a VAE or RAE decodes samples of this shape (C, h, w).

    Raises:
        ValueError: it has no decoder, or is for another shape.
    """
    if isinstance(vae, RAE) and vae.decoder is None:
        raise ValueError(
            f"--vae {name} has no decoder, which pictures and validation need; name one in its "
            "rae.json, or give another --vae"
        )
    try:
        found = vae.latent_shape(*(side * vae.factor for side in shape[1:]))
    except ValueError:
        found = (vae.encoder.width, vae.encoder.grid, vae.encoder.grid)  # of an RAE
    if found != tuple(shape):
        raise ValueError(
            f"--vae {name} decodes latents of shape {found}, and the samples are {tuple(shape)}; "
            "give as --vae what made the data"
        )


def decoded(x: Tensor, vae: Any = None, *, pixels: bool) -> Tensor:
    """Decode samples (B, C, h, w) to images (B, 3, H, W) in [0, 1].

    Args:
        vae: decodes latents; without one they show their first three channels.
        pixels: the samples are pixels in [-1, 1].
    """
    if pixels:
        return to_pixels(x).cpu() / 255
    if vae is None:
        x = x[:, :3].float().cpu()
        return (0.5 + 0.25 * x / x.std()).clamp(0, 1)
    images = torch.cat([vae.decode(part).cpu() for part in x.split(4)])
    return (images * 0.5 + 0.5).clamp(0, 1)
