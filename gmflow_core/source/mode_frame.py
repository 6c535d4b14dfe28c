"""Mode frame: coordinates in which the noise of known source modes is standard normal (MM-FM)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..flow.path import Sigma, expand_sigma
from ..gaussians.mixture import GaussianMixture


@dataclass(frozen=True, eq=False)
class ModeFrame:
    """Coordinates in which the noise of known modes is N(0, I), as in ordinary flow matching.

    With noise mu + s eps the path is x_sigma = (1 - sigma) x_0 + sigma mu + sigma s eps. In the
    frame, y = (x_sigma - sigma mu) / s is an ordinary path from x_0 / s to eps: its transitions,
    posteriors and substeps are those of `flow/path.py`, and its velocity is (u - mu) / s.

    There is no such frame if the mode is unknown (an unconditional network): p(x_sigma | x_0) is
    then a mixture, and only the mean velocity can be followed.

    Args:
        mean: mu, (B, C, *S).
        std: s, one per sample, (B, 1, *1): spherical modes.

    Raises:
        ValueError: the modes are diagonal.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self):
        if self.std[0].numel() != 1:
            raise ValueError(
                "modes with a standard deviation for every dimension, "
                f"{tuple(self.std.shape[1:])}, do not go with a mixture at the network's output, "
                "whose components are isotropic; fit it with --covariance spherical, or sample "
                "with euler"
            )

    def enter(self, x: Tensor, sigma: Sigma) -> Tensor:
        """Return y of x at sigma; both (B, C, *S)."""
        return (x - expand_sigma(sigma, x) * self.mean) / self.std

    def leave(self, y: Tensor, sigma: Sigma) -> Tensor:
        """Return x of y at sigma, the inverse of `enter`."""
        return torch.addcmul(expand_sigma(sigma, y) * self.mean, y, self.std)

    def velocity(self, u: GaussianMixture) -> GaussianMixture:
        """Convert a mixture of x's velocities to one of y's."""
        mean, std = self.mean.unsqueeze(1), self.std.unsqueeze(1)
        return GaussianMixture((u.means - mean) / std, u.log_weights, u.log_std - std.log())

    def denoiser(
        self, denoiser: Callable[[Tensor, Tensor], GaussianMixture]
    ) -> Callable[[Tensor, Tensor], GaussianMixture]:
        """Convert a denoiser (x, sigma) -> mixture of x_0 to one on y, whose x_0 is x_0 / s."""
        std = self.std.unsqueeze(1)

        def denoise(y: Tensor, sigma: Sigma) -> GaussianMixture:
            x0 = denoiser(self.leave(y, sigma), sigma).components()
            return GaussianMixture(x0.means / std, x0.log_weights, x0.log_std - std.log())

        return denoise

    def network(
        self, network: Callable[[Tensor, Tensor], GaussianMixture]
    ) -> Callable[[Tensor, Tensor], GaussianMixture]:
        """Convert a network (x, sigma) -> mixture of velocities to one on y."""
        return lambda y, sigma: self.velocity(network(self.leave(y, sigma), sigma))
