"""Settings of `training.fit_source`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from training.common.settings import require, require_device, require_ranges

Covariance = Literal["diagonal", "spherical"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fitting of a source."""

    data: Path
    """Folder that training.prepare wrote; or an array of samples in .npy, .npz or .safetensors; or,
    with --encoder, a folder of images, whose tokens are fitted."""
    out: Path
    """Folder for the source, the state to go on from, and the report."""
    modes: Annotated[int, tyro.conf.arg(aliases=["-m"])]
    """M, the number of Gaussians; far fewer than samples, or they are memorised."""
    covariance: Covariance = "spherical"
    """Covariance of the source's modes: one variance for each dimension, or one for all."""
    tokens: Path | None = None
    """File with one token for each sample of DATA, in their order."""
    encoder: str | None = None
    """Frozen encoder that makes the tokens: dinov2, siglip2, mae, or a folder or hub id."""
    encoder_size: int | None = None
    """Side of the encoder's input images in pixels; by default that of its family."""
    vae: str | None = None
    """With --encoder and a folder of images: the VAE or RAE whose latents are the samples, encoded
    on the way, as --encode of training.imagenet does. Without it the tokens are the samples."""
    images: Path | None = None
    """Folder of the images that DATA was made from; by default the one that DATA names."""
    image_size: int = 256
    """Width and height of the images' centre crops, before the encoder scales them."""
    assigner_covariance: Covariance = "diagonal"
    """Covariance of the mixture of the tokens, which assigns samples to modes."""
    flip: bool | None = None
    """Count the mirror image of each sample too; by default if training.prepare mirrored some."""
    max_iterations: int = 100
    """EM stops after this many iterations."""
    tolerance: float = 1e-3
    """EM stops when the mean log-likelihood changes by less, in nats."""
    reg_covar: float = 1e-6
    """Added to the variances."""
    precision: Literal["fp32", "fp64"] = "fp32"
    """Type of the products over samples and modes; sums over samples are fp64 either way."""
    batch_size: int = 64
    """Images that the encoder takes at a time."""
    workers: int | None = None
    """Processes that decode images, for each GPU; None: one for each core, up to 8."""
    seed: int = 0
    """Seed of k-means++."""
    device: str = "auto"
    """auto (what accelerate finds) or cpu."""
    restart: bool = False
    """Delete the state found in OUT; tokens are kept."""

    def __post_init__(self):
        for name in ("modes", "max_iterations", "batch_size", "image_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        if self.tolerance < 0 or not self.reg_covar > 0:
            raise ValueError(
                f"--tolerance is {self.tolerance} and --reg-covar {self.reg_covar}; "
                "both must be positive"
            )
        require_device(self.device)
        if self.tokens is not None and self.encoder is not None:
            raise ValueError("both --tokens and --encoder were given; give one of them")
        needed = self.encoder is not None or self.vae is None
        require(needed, "vae", self.vae, "given together with --encoder, or left out")
        require_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Conversion of a published mixture."""

    source: tyro.conf.Positional[Path]
    """Pickle of a scikit-learn mixture or of a dict of arrays, of which nothing is run; or such
    arrays in .npz or .safetensors."""
    out: Path
    """File to write, .safetensors."""
    assigner: Path | None = None
    """Mixture of the tokens (.pkl or .safetensors) that assigns samples to modes."""
