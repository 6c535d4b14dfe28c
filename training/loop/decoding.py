"""Decode samples to pictures, for the trainers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.data.shards import to_pixels


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
