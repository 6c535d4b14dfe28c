"""Diffusion paths x = a x_0 + b eps as the straight path, after a change of time and scale.

Any path with a signal a >= 0 and a noise b >= 0 that are not both 0 is the straight path of
`gmflow_core.flow.path` when x is divided by a + b (Lipman et al. 2024, "Flow Matching Guide and
Code", change of scheduler):

    x / (a + b) = (1 - sigma) x_0 + sigma eps,   sigma = b / (a + b).

The posterior of x_0 given x is the same on both, so the mean of x_0 that an epsilon- or
v-prediction network implies is that of the flow at (x / (a + b), sigma). The variance-preserving
path of DDPM has a = sqrt(alpha_bar), b = sqrt(1 - alpha_bar); the variance-exploding one, on which
k-diffusion's samplers work, has a = 1 and b as its own "sigma".
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .path import Sigma, expand_sigma


@dataclass(frozen=True)
class ScaledPath:
    """A family x = a x_0 + b eps, with a time s of its own.

    Args:
        exploding: True for a = 1, b = s with s >= 0; False for a = 1 - s, b = s noise_scale with
            s in [0, 1].
        noise_scale: factor of the noise, above 0.
    """

    exploding: bool = False
    noise_scale: float = 1.0

    @property
    def straight(self) -> bool:
        """True if it is the straight path itself, so that nothing is to be converted."""
        return not self.exploding and self.noise_scale == 1

    def sigma_of(self, time: Sigma) -> Sigma:
        """Return the straight path's sigma at a time s of this path."""
        if self.straight:
            return time
        noise = self.noise_scale * time
        return noise / ((1 if self.exploding else 1 - time) + noise)

    def time_of(self, sigma: Sigma) -> Sigma:
        """Return the time s at the straight path's sigma: the inverse of `sigma_of`.

        On an exploding path sigma 1 is at infinity.
        """
        if self.straight:
            return sigma
        signal = 1 - sigma
        return sigma / (self.noise_scale * signal + (0 if self.exploding else sigma))

    def enter(self, x: Tensor, sigma: Sigma) -> Tensor:
        """Convert x (B, C, *S) of this path to the straight path's, at the latter's sigma."""
        return x if self.straight else x * self._scale(x, sigma)

    def leave(self, x: Tensor, sigma: Sigma) -> Tensor:
        """Convert x (B, C, *S) of the straight path to this one's: the inverse of `enter`."""
        return x if self.straight else x / self._scale(x, sigma)

    def _scale(self, x: Tensor, sigma: Sigma) -> Tensor:
        """Return 1 / (a + b), broadcastable to x."""
        sigma = expand_sigma(sigma, x)
        signal = 1 - sigma  # a / (a + b)
        return signal if self.exploding else signal + sigma / self.noise_scale


STRAIGHT = ScaledPath()
