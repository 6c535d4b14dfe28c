"""Policies: what one network call says of the velocity, or of x_0, at every time until the next one (pi-Flow, Chen et al. 2025,
arXiv 2510.14974).

The GM policy is a Gaussian mixture and the posterior mean it implies (`path.posterior_mean`). The DX policy predicts x_0 itself
at some times of the coming segment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..gaussians.mixture import GaussianMixture
from .path import Sigma, expand_sigma, unshift_time, velocity_to_x0

MIN_SEGMENT = 1e-4  # divisions by a segment's size stop here
DX_MODES = ("grid", "polynomial")


@dataclass(frozen=True, eq=False)
class DXVelocity:
    """What a network with a DX head predicts: velocities that stand for x_0 = x - sigma u at N times, or N coefficients.

    Time t is the unshifted one, `unshift_time(sigma, shift)`. The segment goes from the time of the call down by
    `segment_size`, at most to 0.

    Args:
        velocities: (B, N, C, *S). mode "grid": at N equidistant times from the segment's end to its start, linear between them.
            "polynomial": x_0 is sum_i (x - sigma u_i) (t_start - t)^i.
        segment_size: in (0, 1]; 1 / 3.5 for adapters of 4 steps.
        shift: the time shift that the network was trained with.
        mode: one of DX_MODES.

    Raises:
        ValueError: a setting is out of range.
    """

    velocities: Tensor
    segment_size: float = 1.0
    shift: float = 1.0
    mode: str = "grid"

    def __post_init__(self):
        if self.mode not in DX_MODES:
            raise ValueError(
                f"DX policy of mode {self.mode!r}; this version knows {', '.join(DX_MODES)}"
            )
        numbers = [
            isinstance(value, int | float) and value > 0
            for value in (self.segment_size, self.shift)
        ]
        if not all(numbers) or not self.segment_size <= 1 or not math.isfinite(self.shift):
            raise ValueError(
                f"DX policy with segment_size {self.segment_size!r} and shift {self.shift!r}; the size must be a number in "
                "(0, 1] and the shift a positive one"
            )

    def mean(self) -> Tensor:
        """The velocity at the time of the call, (B, C, *S): what a sampler that knows no policies follows."""
        return self.velocities[:, -1 if self.mode == "grid" else 0].float()

    def fits(self, x: Tensor) -> bool:
        """Whether these are velocities of tensors of the shape of x, (B, C, *S)."""
        return (self.velocities.shape[0], *self.velocities.shape[2:]) == tuple(x.shape)

    def to(self, device: torch.device) -> DXVelocity:
        """The velocities on another device."""
        return replace(self, velocities=self.velocities.to(device))

    def chunk(self, chunks: int) -> list[DXVelocity]:
        """The batch in equal parts."""
        return [replace(self, velocities=part) for part in self.velocities.chunk(chunks)]


@dataclass(frozen=True, eq=False)
class DXPolicy:
    """x_0 over the coming segment, from a `DXVelocity` predicted at (x, sigma).

    Args:
        x0: (B, N, C, *S).
        sigma: of the call, broadcastable to (B, 1, *S).
        settings: the velocity it comes from.
    """

    x0: Tensor
    sigma: Tensor
    settings: DXVelocity

    def mean(self) -> Tensor:
        """x_0 at the time of the call, (B, C, *S)."""
        return self.x0[:, -1 if self.settings.mode == "grid" else 0]

    def moved(self, by: Tensor) -> DXPolicy:
        """x_0 at every time moved by (B, C, *S)."""
        if (
            self.settings.mode == "polynomial"
        ):  # the other entries are coefficients of powers of time
            return replace(
                self, x0=torch.cat([self.x0[:, :1] + by.unsqueeze(1), self.x0[:, 1:]], 1)
            )
        return replace(self, x0=self.x0 + by.unsqueeze(1))

    def at(self, sigma: Sigma) -> Tensor:
        """x_0, (B, C, *S), at `sigma`, as for `velocity_to_x0`; outside of the segment a grid's last or first value."""
        shift, count = self.settings.shift, self.x0.shape[1]
        start = unshift_time(self.sigma, shift)
        time = unshift_time(expand_sigma(sigma, self.x0[:, 0]), shift)
        if self.settings.mode == "polynomial":
            return sum(self.x0[:, i] * (start - time) ** i for i in range(count))
        end = (start - self.settings.segment_size).clamp(min=0)
        place = ((time - end) / (start - end).clamp(min=MIN_SEGMENT)).clamp(0, 1) * (count - 1)
        # linear interpolation as a sum of hat functions: no index depends on the values
        return sum(self.x0[:, i] * (1 - (place - i).abs()).clamp(min=0) for i in range(count))


Policy = GaussianMixture | DXPolicy


def predict_x0(velocity: GaussianMixture | DXVelocity, x: Tensor, sigma: Sigma) -> Policy:
    """The policy in x_0 of what a network predicted at (x, sigma), (B, C, *S)."""
    if isinstance(velocity, DXVelocity):
        sigma = expand_sigma(sigma, x)
        x0 = x.unsqueeze(1) - sigma.unsqueeze(1) * velocity.velocities.float()
        return DXPolicy(x0, sigma, replace(velocity, velocities=velocity.velocities[:0]))
    return velocity_to_x0(velocity, x, sigma)
