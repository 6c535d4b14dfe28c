"""The autoencoder between images and latents: diffusers' AutoencoderKL, from a folder or the hub.

The other kind, `training.rae_networks.RAE`, has the same few names: `latent_shape`, `factor`, `space`, `scaling_factor`,
`needs_noise`, `encode` and `decode`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    pass
SD_VAE = "stabilityai/sd-vae-ft-ema"


class VAE(nn.Module):
    """AutoencoderKL in float32, frozen; latents are scaled to about unit variance by its own `scaling_factor`."""

    space = "sd-vae"
    needs_noise = True  # latents are samples of a posterior

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.float().eval().requires_grad_(False)
        self.scaling_factor: float = network.config.scaling_factor
        self.shift_factor: float = network.config.shift_factor or 0.0
        self.factor = 2 ** (
            len(network.config.block_out_channels) - 1
        )  # pixels per latent pixel, each way

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a picture.

        Raises:
            ValueError: the picture does not divide into whole latent pixels.
        """
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"pictures of {width}x{height} do not fit this VAE; give a multiple of {self.factor}"
            )
        return self.network.config.latent_channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """One sample of the posterior of each picture, scaled.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            noise: (B, C, h, w), standard normal, as `latent_shape` says.

        Returns:
            (B, C, h, w) float32.
        """
        posterior = self.network.encode(images.float()).latent_dist
        return (posterior.mean + posterior.std * noise - self.shift_factor) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of scaled latents (B, C, h, w); about [-1, 1], not clamped."""
        return self.network.decode(latents.float() / self.scaling_factor + self.shift_factor).sample
