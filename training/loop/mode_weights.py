"""Weight the loss by the modes of a mixture source."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class ModeWeights:
    """MM-FM's focal weights: samples of modes with a large loss count more.

    The weight of a mode is (its average loss / mean of these over the modes)^2, divided by the mean
    over the modes and clamped to [0.3, 3]; in the first iterations it is 1. The averages forget old
    losses exponentially.

    Args:
        modes: M, the number of modes.
    """

    POWER, LOWEST, HIGHEST, DECAY, WARMUP = 2.0, 0.3, 3.0, 0.9995, 2500

    def __init__(self, modes: int):
        self.sums = torch.zeros(2, modes)  # decayed sums of the losses, and of their number

    @property
    def losses(self) -> Tensor:
        """Average loss (M,) of each mode; a mode without samples has the average over all."""
        total, count = self.sums
        return torch.where(
            count > 0, total / count.clamp(min=1e-30), total.sum() / count.sum().clamp(min=1e-30)
        )

    def __call__(self, modes: Tensor, step: int) -> Tensor:
        """Return the weights (B,) of samples of these modes (B,) at iteration `step`."""
        if step < self.WARMUP:
            return torch.ones(len(modes), device=self.sums.device)
        losses = self.losses
        weights = (losses / losses.mean()).pow(self.POWER)
        return (weights / weights.mean()).clamp(self.LOWEST, self.HIGHEST)[modes]

    def update(self, modes: Tensor, losses: Tensor, reduce: Callable[[Tensor], Tensor]) -> None:
        """Add the losses of an iteration; losses that are not finite are ignored.

        Args:
            modes, losses: (B,).
            reduce: sums a tensor over the processes.
        """
        found = torch.zeros_like(self.sums)
        finite = losses.isfinite()
        found[0].index_add_(0, modes, torch.where(finite, losses, 0))
        found[1].index_add_(0, modes, finite.to(found))
        self.sums = self.DECAY * self.sums + reduce(found)
