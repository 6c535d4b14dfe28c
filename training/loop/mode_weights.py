"""Modes of a mixture source in training: the tokens that they are found by, and weights of the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class ModeWeights:
    """Weights of the samples in the loss by their mode: (average loss of the mode / mean of these)^2, brought to a mean of 1
    over the modes, then between 0.3 and 3 (MM-FM's focal weights; all 1 in the first iterations). Old losses are forgotten.

    Args:
        modes: M.
    """

    POWER, LOWEST, HIGHEST, DECAY, WARMUP = 2.0, 0.3, 3.0, 0.9995, 2500

    def __init__(self, modes: int):
        self.sums = torch.zeros(2, modes)  # of the losses, and how many

    @property
    def losses(self) -> Tensor:
        """The average loss (M,) of each mode; of one that never came, that of the others."""
        total, count = self.sums
        return torch.where(
            count > 0, total / count.clamp(min=1e-30), total.sum() / count.sum().clamp(min=1e-30)
        )

    def __call__(self, modes: Tensor, step: int) -> Tensor:
        """(B,) for samples of these modes, at iteration `step`."""
        if step < self.WARMUP:
            return torch.ones(len(modes), device=self.sums.device)
        losses = self.losses
        weights = (losses / losses.mean()).pow(self.POWER)
        return (weights / weights.mean()).clamp(self.LOWEST, self.HIGHEST)[modes]

    def update(self, modes: Tensor, losses: Tensor, reduce: Callable[[Tensor], Tensor]) -> None:
        """Take in what an iteration found for samples (B,); `reduce` adds up over the processes."""
        found = torch.zeros_like(self.sums)
        finite = losses.isfinite()
        found[0].index_add_(0, modes, torch.where(finite, losses, 0))
        found[1].index_add_(0, modes, finite.to(found))
        self.sums = self.DECAY * self.sums + reduce(found)
