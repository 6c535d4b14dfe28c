"""Spectrum network: predicts the power of each spatial frequency in GM-SDE's draws."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from ..gaussians.mixture import IsotropicGaussian


class SpectrumMLP(nn.Module):
    """MLP from two statistics of the Gaussian of x_0 to the log power spectrum of whitened x_0.

    GMFlow, ICML 2025. Whitening maps each pixel's mixture to a standard normal, see
    `sample_with_spectrum`. Parameters are named as in the published checkpoints (`mlp.N`).

    Args:
        base_size: (C, h, w) in training, the largest latent that it can serve.
        layers: widths of the hidden layers.
    """

    def __init__(
        self, base_size: tuple[int, int, int] = (4, 32, 32), layers: tuple[int, ...] = (64, 8)
    ):
        super().__init__()
        self.base_size = tuple(base_size)
        hidden = [(nn.Linear(a, b), nn.SiLU()) for a, b in itertools.pairwise([2, *layers])]
        self.mlp = nn.Sequential(
            *[m for layer in hidden for m in layer],
            nn.Linear([2, *layers][-1], math.prod(base_size)),
        )
        self.reset_parameters()

    def reset_parameters(self):
        """Initialise so that every spectrum is white."""
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.mlp[-1].weight)

    def forward(self, x0: IsotropicGaussian) -> Tensor:
        """Predict the log power spectrum.

        Args:
            x0: the Gaussian of x_0 that the draw is made from: mean (B, C, h, w), var
                broadcastable to (B, 1, h, w).

        Returns:
            (B, C, h, w), float32: log power at every frequency (in the FFT's order) of every
            principal axis; the mean power of an axis is 1.

        Raises:
            ValueError: the latent has other channels than the network, or is larger.
        """
        channels, base_height, base_width = self.base_size
        height, width = x0.mean.shape[-2:]
        other = x0.mean.ndim != 4 or x0.mean.shape[1] != channels
        if other or height > base_height or width > base_width:
            raise ValueError(
                f"the spectrum network serves latents of {channels} channels up to {base_height} x "
                f"{base_width}, not {tuple(x0.mean.shape)}"
            )
        spread = x0.mean.new_zeros(len(x0.mean))  # variance of the mean over the pixels
        if height * width > 1:
            spread = x0.mean.var((-2, -1)).mean(1)
        statistics = torch.stack([x0.var.mean((1, 2, 3)).expand(len(x0.mean)), spread], 1)
        spectrum = self.mlp(statistics.to(self.mlp[0].weight.dtype)).float()
        spectrum = spectrum.unflatten(1, self.base_size)
        spectrum = _low_frequencies(_low_frequencies(spectrum, height, 2), width, 3)
        share = spectrum.flatten(2).log_softmax(2).unflatten(2, (height, width))
        return share + math.log(height * width)


def _low_frequencies(spectrum: Tensor, count: int, dim: int) -> Tensor:
    """Return the `count` lowest frequencies of a dimension, in the FFT's order (0, 1, ..., -1)."""
    negative = count // 2
    low = spectrum.narrow(dim, 0, count - negative)
    high = spectrum.narrow(dim, spectrum.shape[dim] - negative, negative)
    return torch.cat([low, high], dim)
