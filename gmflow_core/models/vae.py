"""A frozen AutoencoderKL of diffusers between images and latents.

`files/diffusers_vae.py` loads it. `training.encoders.rae.RAE` is the other autoencoder. Both have
the same members: `latent_shape`, `factor`, `space`, `scaling_factor`, `needs_noise`, `encode` and
`decode`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .settings import is_number

SD_VAE = "stabilityai/sd-vae-ft-ema"


class VAE(nn.Module):
    """A frozen AutoencoderKL in float32.

    Latents are shifted and scaled to about zero mean and unit variance by the `shift_factor` and
    `scaling_factor` of its config.

    Args:
        network: diffusers' AutoencoderKL.

    Raises:
        ValueError: a factor of its config is missing, 0 or not finite.
    """

    space = "sd-vae"
    needs_noise = True  # a latent is a sample of the posterior

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.float().eval().requires_grad_(False)
        config = network.config
        self.scaling_factor: float = _checked(config, "scaling_factor")
        if self.scaling_factor <= 0:
            raise ValueError(f"scaling_factor is {self.scaling_factor}; it must be above 0")
        self.shift_factor: float = _checked(config, "shift_factor") if config.shift_factor else 0.0
        self.factor = 2 ** (len(config.block_out_channels) - 1)  # pixels per latent pixel, per side

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the latent shape (C, h, w) of an image.

        Raises:
            ValueError: a side of the image is not a multiple of `factor`.
        """
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"pictures of {width}x{height} do not fit this VAE; "
                f"give a multiple of {self.factor}"
            )
        return self.network.config.latent_channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """Draw one latent from the posterior of each image, shifted and scaled.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            noise: (B, C, h, w), standard normal; (C, h, w) as `latent_shape` returns.

        Returns:
            (mean + std * noise - shift_factor) * scaling_factor, (B, C, h, w) float32.
        """
        posterior = self.network.encode(images.float()).latent_dist
        return (posterior.mean + posterior.std * noise - self.shift_factor) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (B, C, h, w) to images (B, 3, H, W), about [-1, 1], unclamped."""
        return self.network.decode(latents.float() / self.scaling_factor + self.shift_factor).sample


def _checked(config: Any, name: str) -> float:
    """Return a factor of a VAE's config.

    Raises:
        ValueError: it is missing, or no finite number.
    """
    value = getattr(config, name, None)
    if not is_number(value):
        raise ValueError(
            f"{name} is {value!r:.60}; it must be a finite number (0.18215 is the scaling_factor "
            "of Stable Diffusion's VAE)"
        )
    return float(value)
