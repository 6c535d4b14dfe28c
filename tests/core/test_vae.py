"""VAE between images and latents, against the formula of its shift and scale."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gmflow_core.models.vae import VAE
from tests.helpers import is_near, normal


class TwoPixels(nn.Module):
    """Stand-in for AutoencoderKL: the mean is every other pixel, the std is 0.5."""

    def __init__(self, shift_factor):
        super().__init__()
        self.config = SimpleNamespace(
            scaling_factor=0.4,
            shift_factor=shift_factor,
            block_out_channels=(4, 8),
            latent_channels=3,
        )

    def encode(self, images):
        mean = images[:, :, ::2, ::2]
        return SimpleNamespace(
            latent_dist=SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.5))
        )

    def decode(self, latents):
        return SimpleNamespace(sample=latents.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("shift_factor", [None, 0.3, -1.7])
def test_latents_are_shifted_and_scaled_and_back(shift_factor):
    """encode: (mean + std * noise - shift) * scale; decode gives back what was encoded."""
    vae, images, noise = (
        VAE(TwoPixels(shift_factor)),
        normal(2, 3, 4, 4),
        normal(2, 3, 2, 2, seed=2),
    )
    assert vae.latent_shape(4, 6) == (3, 2, 3)
    raw = images[:, :, ::2, ::2] + 0.5 * noise
    latents = vae.encode(images, noise)
    assert is_near(latents, (raw - (shift_factor or 0.0)) * 0.4, 1e-6)
    assert is_near(vae.decode(latents)[:, :, ::2, ::2], raw, 1e-6)


@pytest.mark.parametrize("shift_factor", [None, 0.3])
def test_diffusers_says_where_the_mean_lies(shift_factor):
    """With a real AutoencoderKL, whose pipelines decode latents / scaling_factor + shift_factor."""
    try:
        from diffusers import AutoencoderKL
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"diffusers does not import: {error}")
    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.25,
        shift_factor=shift_factor,
    )
    vae, images = VAE(network), normal(1, 3, 8, 8).tanh()
    mean = network.encode(images).latent_dist.mean
    latents = vae.encode(images, torch.zeros_like(mean))
    assert is_near(latents / 0.25 + (shift_factor or 0.0), mean, 1e-6)
    assert is_near(vae.decode(latents), network.decode(mean).sample, 1e-5)
