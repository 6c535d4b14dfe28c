"""What images are compared by: features of Inception, or of a small classifier trained on the data.

An extractor has a `name` and `facts` for reports, `classes` (the names its probabilities stand for, None where they are not
the data's), a `fingerprint` that changes with its weights, and `extract(images)`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Extractor(Protocol):
    """Features of images; see the top of this file."""

    name: str
    classes: tuple[str, ...] | None
    fingerprint: str

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says about it."""

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) -> {"features": (B, D) float32, "probabilities": (B, classes) float32}, on the CPU."""


def _short(error: Exception) -> str:
    """The beginning of a long message, in one line."""
    return " ".join(str(error).split())[:200]


def _checked(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"features are of uint8 images (B, 3, H, W), not of {images.dtype} {tuple(images.shape)}"
        )
    return images
