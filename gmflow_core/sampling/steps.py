"""Steps of a solver: its intervals, and a sigma for every sample."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def intervals(sigmas: Tensor | Sequence[float]) -> list[tuple[float, float]]:
    """Return (sigma, next sigma) of every step.

    Raises:
        ValueError: the sigmas are not a descending sequence of at least two values in [0, 1].
    """
    values = sigmas.tolist() if isinstance(sigmas, Tensor) else [float(s) for s in sigmas]
    found = list(itertools.pairwise(values))
    if not found or any(not 1 >= high > low >= 0 for high, low in found):
        raise ValueError(
            f"sigmas {values} are not a descending sequence of at least two values in [0, 1]"
        )
    return found


def batch_sigma(x: Tensor, sigma: float) -> Tensor:
    """Return `sigma` for every sample of x, (B,), in float32."""
    return x.new_full((x.shape[0],), sigma, dtype=torch.float32)
