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
        """Name, dimensions, spatial dimensions and fingerprint, for a report."""

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """Extract features, spatial features and class probabilities.

        Args:
            images: uint8 (B, 3, H, W).

        Returns:
            "features" (B, D), "spatial" (B, S) as `flat_maps` returns, and "probabilities" (B,
            classes), float32 on the CPU.
        """


SPATIAL_CHANNELS = 7  # of a feature map, as ADM's evaluator takes


def flat_maps(maps: Tensor) -> Tensor:
    """Return spatial features (B, 7 h w) of a feature map (B, C, h, w).

    As in ADM's evaluator: the first 7 channels, in the order of its arrays (h, w, C), so that its
    reference files fit.
    """
    return maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float().cpu()


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
