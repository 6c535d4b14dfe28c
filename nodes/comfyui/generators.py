"""Random generators that give an image the same numbers whatever else is in its batch."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor


def image_generators(seed: int, noise: Tensor) -> list[torch.Generator]:
    """Return a generator for each image of a batch, made from the seed and the image's noise.

    ComfyUI draws the initial noise (B, ...) by the image's index in the batch, so an image's
    generator does not depend on the other images.
    """
    keys = [zlib.crc32(image.float().cpu().numpy().tobytes()) for image in noise]
    if not noise.any():  # noise is disabled, and tells no image from another
        keys = list(range(len(noise)))
    return generators(seed, keys)


def generators(seed: int, keys: Iterable[int]) -> list[torch.Generator]:
    """Return a generator for each 32-bit key.

    Seed and key are hashed to 32 bits, as a CPU generator reads no more than 32 bits of its seed.
    """
    return [
        torch.Generator().manual_seed(zlib.crc32(seed.to_bytes(8, "little"), key)) for key in keys
    ]
