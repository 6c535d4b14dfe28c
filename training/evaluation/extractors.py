"""Interface of feature extractors: Inception, or a small classifier trained on the data."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Extractor(Protocol):
    """Features of images.

    Attributes:
        name: for reports.
        classes: names of the classes of the probabilities; None if they are not the data's.
        fingerprint: changes with the weights.
    """

    name: str
    classes: tuple[str, ...] | None
    fingerprint: str

    @property
    def facts(self) -> dict[str, Any]:
        """Name, dimensions and fingerprint, for a report."""

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """Extract features and class probabilities.

        Args:
            images: uint8 (B, 3, H, W).

        Returns:
            "features" (B, D) and "probabilities" (B, classes), float32 on the CPU.
        """


def check_images(images: Tensor) -> Tensor:
    """Return the images if they are uint8 (B, 3, H, W).

    Raises:
        ValueError: they are not.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            "features are of uint8 images (B, 3, H, W), "
            f"not of {images.dtype} {tuple(images.shape)}"
        )
    return images


def one_line(error: Exception) -> str:
    """Return the first 200 characters of an error's message, in one line."""
    return " ".join(str(error).split())[:200]
