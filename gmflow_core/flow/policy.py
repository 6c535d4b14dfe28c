"""Policies: the velocity or x_0 that one network call predicts for all times until the next call.

Source: pi-Flow (Chen et al. 2025, arXiv 2510.14974). The GM policy is a Gaussian mixture and the
posterior mean that it implies (`path.posterior_mean`). The DX policy predicts x_0 itself at some
times of the coming segment. ArcFlow's policy is in `arc_policy`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..gaussians.mixture import Mixture
from .arc_policy import ArcPolicy, ArcVelocity
from .path import Sigma, expand_sigma, unshift_time, velocity_to_x0

MIN_SEGMENT = 1e-4  # lower bound in divisions by a segment's size
DX_MODES = ("grid", "polynomial")
FINAL_STEP_SIZE = 0.5  # last step relative to the others, in the time grids of pi-Flow's adapters


@dataclass(frozen=True, eq=False)
class DXVelocity:
    """Output of a network with a DX head: velocities that stand for x_0 = x - sigma u.

    They give x_0 at N times, or as N coefficients. Time t is the unshifted one,
    `unshift_time(sigma, shift)`. The segment goes from the time of the call down by
    `segment_size`, at most to 0.

    Args:
        velocities: (B, N, C, *S). Mode "grid": at N equidistant times from the segment's end to
            its start, linear between them. Mode "polynomial": x_0 is
            sum_i (x - sigma u_i) (t_start - t)^i.
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
        settings = (self.segment_size, self.shift)
        positive = all(isinstance(value, int | float) and value > 0 for value in settings)
        if not positive or not self.segment_size <= 1 or not math.isfinite(self.shift):
            raise ValueError(
                f"DX policy with segment_size {self.segment_size!r} and shift {self.shift!r}; "
                "the size must be a number in (0, 1] and the shift a positive one"
            )

    def mean(self) -> Tensor:
        """Return the velocity at the time of the call, (B, C, *S), for samplers of the mean."""
        return self.velocities[:, -1 if self.mode == "grid" else 0].float()

    def fits(self, x: Tensor) -> bool:
        """Return whether these are velocities of tensors with the shape of x, (B, C, *S)."""
        return (self.velocities.shape[0], *self.velocities.shape[2:]) == tuple(x.shape)

    def to(self, device: torch.device) -> DXVelocity:
        """Move the velocities to a device."""
        return replace(self, velocities=self.velocities.to(device))

    def chunk(self, chunks: int) -> list[DXVelocity]:
        """Split the batch into equal parts."""
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

    kind = "a DX policy"

    def mean(self) -> Tensor:
        """Return x_0 at the time of the call, (B, C, *S)."""
        return self.x0[:, -1 if self.settings.mode == "grid" else 0]

    def moved(self, by: Tensor) -> DXPolicy:
        """Shift x_0 at every time by (B, C, *S)."""
        by = by.unsqueeze(1)
        if self.settings.mode == "grid":
            return replace(self, x0=self.x0 + by)
        return replace(self, x0=torch.cat([self.x0[:, :1] + by, self.x0[:, 1:]], 1))

    def with_temperature(self, temperature: float) -> DXPolicy:
        """Return the policy as it is: it has no temperature."""
        return self

    def at(self, sigma: Sigma) -> Tensor:
        """Return x_0, (B, C, *S), at `sigma`; a grid is clamped to its ends outside the segment.

        Args:
            sigma: as in `velocity_to_x0`.
        """
        shift, count = self.settings.shift, self.x0.shape[1]
        start = unshift_time(self.sigma, shift)
        time = unshift_time(expand_sigma(sigma, self.x0[:, 0]), shift)
        if self.settings.mode == "polynomial":
            return sum(self.x0[:, i] * (start - time) ** i for i in range(count))
        end = (start - self.settings.segment_size).clamp(min=0)
        place = ((time - end) / (start - end).clamp(min=MIN_SEGMENT)).clamp(0, 1) * (count - 1)
        # linear interpolation as a sum of hat functions: no index depends on the values
        return sum(self.x0[:, i] * (1 - (place - i).abs()).clamp(min=0) for i in range(count))


Policy = Mixture | DXPolicy | ArcPolicy
PolicyVelocity = Mixture | DXVelocity | ArcVelocity  # what networks predict
NO_MIXTURES = (DXPolicy, ArcPolicy)  # policies without Gaussians; their `kind` is for messages


def predict_x0(velocity: PolicyVelocity, x: Tensor, sigma: Sigma) -> Policy:
    """Convert a network's output at (x, sigma), x (B, C, *S), to the policy in x_0."""
    if isinstance(velocity, ArcVelocity):
        rates = velocity.rates.to(torch.promote_types(velocity.rates.dtype, torch.float32))
        return ArcPolicy(x, expand_sigma(sigma, x), velocity.amplitudes(), rates)
    if isinstance(velocity, DXVelocity):
        sigma = expand_sigma(sigma, x)
        x0 = x.unsqueeze(1) - sigma.unsqueeze(1) * velocity.velocities.float()
        return DXPolicy(x0, sigma, replace(velocity, velocities=velocity.velocities[:0]))
    return velocity_to_x0(velocity, x, sigma)
