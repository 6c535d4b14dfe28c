"""Measure the colour saturation of images, and compare it with that of training.digits."""

from __future__ import annotations

import torch
from torch import Tensor

from training.data.digits import SATURATION


def saturation_cdf(s: Tensor) -> Tensor:
    """Return the distribution function of the digits' saturations: 3 u^2 - 2 u^3.

    u is s mapped from `SATURATION` to [0, 1] and clamped.
    """
    u = ((s - SATURATION[0]) / (SATURATION[1] - SATURATION[0])).clamp(0, 1)
    return u * u * (3 - 2 * u)


def image_saturation(images: Tensor) -> Tensor:
    """Measure the saturation of each image: sum(max - min) / sum(max) over its pixels.

    max and min are over R, G, B. For a digit drawn in one colour on black this is the saturation
    of that colour, up to the rounding to 8 bits.

    Args:
        images: (B, 3, h, w), uint8, or float in [0, 1]; floats outside are clamped.

    Returns:
        (B,) in [0, 1]; 0 for a black image.

    Raises:
        ValueError: the images have another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"saturation needs RGB images (B, 3, h, w); got {tuple(images.shape)}")
    images = images.float() if images.dtype == torch.uint8 else images.float().clamp(0, 1)
    high, low = images.amax(1), images.amin(1)  # (B, h, w)
    return (high - low).sum((1, 2)) / high.sum((1, 2)).clamp(min=1e-6)


def saturation_distance(values: Tensor, bins: int = 20) -> float:
    """Return the total variation distance of measured saturations to the digits' distribution.

    Both are compared as histograms; the distance is in [0, 1].

    Args:
        values: (n,) as `image_saturation` returns.
        bins: of equal width over [0, 1].

    Raises:
        ValueError: there are no values, or some are not finite.
    """
    values = values.detach().double().flatten().cpu()
    if not len(values) or not values.isfinite().all():
        raise ValueError(
            f"the saturations of {len(values)} images are empty or not finite; check the samples"
        )
    places = (values.clamp(0, 1) * bins).long().clamp(max=bins - 1)
    found = torch.bincount(places, minlength=bins) / len(values)
    expected = saturation_cdf(torch.linspace(0, 1, bins + 1, dtype=torch.float64)).diff()
    return 0.5 * (found - expected).abs().sum().item()
