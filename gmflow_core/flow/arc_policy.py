"""ArcFlow's policy: velocities that grow or decay exponentially until the next network call.

Source: ArcFlow (Yang et al. 2026, arXiv 2602.09014). The policy does not depend on x, so that x at
any later time has a closed form, without substeps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .path import Sigma, expand_sigma


@dataclass(frozen=True, eq=False)
class ArcVelocity:
    """Output of a network with an ArcFlow head, at sigma_s.

    On the way to sigma the velocity is sum_k w_k m_k exp(g_k (sigma_s - sigma)), where the first
    component is constant: g_0 = 0.

    Args:
        velocities: m_k, (B, K, C, *S).
        log_weights: log w_k, (B, K, 1, *S), normalised over K.
        rates: g_k of all components but the first, (B, K - 1, 1, *S).
    """

    velocities: Tensor
    log_weights: Tensor
    rates: Tensor

    def mean(self) -> Tensor:
        """Return the velocity at the time of the call, (B, C, *S), for samplers of the mean."""
        return self.amplitudes().sum(1)

    def amplitudes(self) -> Tensor:
        """Return w_k m_k, (B, K, C, *S), in float32 or what is wider."""
        wide = torch.promote_types(self.velocities.dtype, torch.float32)
        return self.log_weights.to(wide).exp() * self.velocities.to(wide)

    def fits(self, x: Tensor) -> bool:
        """Return whether these are velocities of tensors with the shape of x, (B, C, *S)."""
        return (self.velocities.shape[0], *self.velocities.shape[2:]) == tuple(x.shape)

    def to(self, device: torch.device) -> ArcVelocity:
        """Move the tensors to a device."""
        return ArcVelocity(*(each.to(device) for each in self._tensors()))

    def chunk(self, chunks: int) -> list[ArcVelocity]:
        """Split the batch into equal parts."""
        parts = (each.chunk(chunks) for each in self._tensors())
        return [ArcVelocity(*each) for each in zip(*parts, strict=True)]

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.velocities, self.log_weights, self.rates


@dataclass(frozen=True, eq=False)
class ArcPolicy:
    """Velocities over the coming segment, from an `ArcVelocity` predicted at (x, sigma).

    Args:
        x: (B, C, *S).
        sigma: of the call, broadcastable to (B, 1, *S), above 0.
        amplitudes: w_k m_k, (B, K, C, *S).
        rates: as of `ArcVelocity`.
    """

    x: Tensor
    sigma: Tensor
    amplitudes: Tensor
    rates: Tensor

    kind = "an ArcFlow policy"

    def mean(self) -> Tensor:
        """Return x_0 at the time of the call, (B, C, *S)."""
        return self.x - self.sigma * self.amplitudes.sum(1)

    def moved(self, by: Tensor) -> ArcPolicy:
        """Shift x_0 by (B, C, *S), with a constant velocity that is added at every time."""
        constant = self.amplitudes[:, :1] - (by / self.sigma).unsqueeze(1)
        return replace(self, amplitudes=torch.cat([constant, self.amplitudes[:, 1:]], 1))

    def with_temperature(self, temperature: float) -> ArcPolicy:
        """Return the policy as it is: it has no temperature."""
        return self

    def velocity(self, sigma: Sigma) -> Tensor:
        """Return the velocity, (B, C, *S), at `sigma`, which is given as in `velocity_to_x0`."""
        return self._grown(expand_sigma(sigma, self.x)).sum(1)

    def advance(self, x: Tensor, sigma: Sigma, sigma_end: Sigma) -> Tensor:
        """Return x at `sigma_end` for x (B, C, *S) at `sigma`, in closed form.

        It is x - sum_k a_k exp(g_k (sigma_s - sigma)) (exp(g_k d) - 1) / g_k with the amplitudes
        a_k and d = sigma - sigma_end; where g_k d is 0, the last factor is d.
        """
        sigma, sigma_end = expand_sigma(sigma, x), expand_sigma(sigma_end, x)
        size = (sigma - sigma_end).unsqueeze(1)
        growth = _mean_growth(self.rates * size)
        grown = self._grown(sigma)
        return x - size.squeeze(1) * (grown[:, 0] + (grown[:, 1:] * growth).sum(1))

    def _grown(self, sigma: Tensor) -> Tensor:
        """Return the components' velocities at `sigma`, (B, K, C, *S)."""
        growth = (self.rates * (self.sigma - sigma).unsqueeze(1)).exp()
        return torch.cat([self.amplitudes[:, :1], self.amplitudes[:, 1:] * growth], 1)


def _mean_growth(exponent: Tensor) -> Tensor:
    """Return (exp(z) - 1) / z, the mean of exp over [0, z]; 1 at z = 0."""
    tiny = exponent.abs() < torch.finfo(exponent.dtype).eps
    return torch.where(tiny, 1.0, exponent.expm1() / torch.where(tiny, 1.0, exponent))
