"""Settings of source fitting."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

Covariance = Literal["diagonal", "spherical"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fitting of a source."""

    data: Path
    """Folder that training.prepare wrote; or an array of samples in .npy, .npz or .safetensors; or, with --encoder, a folder of
    images, whose tokens are fitted."""
    out: Path
    """Folder for the source, the state to go on from, and the report."""
    modes: Annotated[int, tyro.conf.arg(aliases=["-m"])]
    """M, the number of Gaussians; far fewer than samples, or they are learnt by heart."""
    covariance: Covariance = "spherical"
    """Of the source's modes: one variance for each dimension, or one for all of them."""
    tokens: Path | None = None
    """File with one token for each sample of DATA, in their order."""
    encoder: str | None = None
    """Frozen encoder that makes the tokens: dinov2, siglip2, mae, or the folder or hub id of one."""
    encoder_size: int | None = None
    """Pixels a side that the encoder is given; that of its kind by default."""
    images: Path | None = None
    """The images that DATA was made from; where they were then by default."""
    image_size: int = 256
    """Width and height of the images' centre crops, before the encoder scales them."""
    assigner_covariance: Covariance = "diagonal"
    """Of the mixture of the tokens, which says what mode a sample belongs to."""
    flip: bool | None = None
    """Count each sample's mirror image too; by default if training.prepare mirrored some."""
    max_iterations: int = 100
    """EM ends after so many iterations."""
    tolerance: float = 1e-3
    """EM ends when the mean log-likelihood changes by less, in nats."""
    reg_covar: float = 1e-6
    """Added to the variances."""
    precision: Literal["fp32", "fp64"] = "fp32"
    """Of the products over samples and modes; sums over samples are fp64 either way."""
    batch_size: int = 64
    """Images that the encoder takes at a time."""
    workers: int | None = None
    """Processes that decode images, for each GPU; by default as many as there are cores for, up to 8."""
    seed: int = 0
    """Seed of k-means++."""
    device: str = "auto"
    """auto (what accelerate finds) or cpu."""
    restart: bool = False
    """Throw away the state found in OUT; tokens are kept."""

    def __post_init__(self):
        for name in ("modes", "max_iterations", "batch_size", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1"
                )
        if self.tolerance < 0 or not self.reg_covar > 0:
            raise ValueError(
                f"--tolerance is {self.tolerance} and --reg-covar {self.reg_covar}; both must be positive"
            )
        if self.device not in ("auto", "cpu"):
            raise ValueError(
                f"--device is {self.device!r}; give auto or cpu (choose a GPU with CUDA_VISIBLE_DEVICES)"
            )
        if self.tokens is not None and self.encoder is not None:
            raise ValueError(
                "both --tokens and --encoder were given; the tokens come from one of them"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Conversion of a published mixture."""

    source: tyro.conf.Positional[Path]
    """Pickle of a scikit-learn mixture or of a dict of arrays; nothing in it is run."""
    out: Path
    """File to write, .safetensors."""
    assigner: Path | None = None
    """The mixture of the tokens (.pkl or .safetensors), for one of latents."""
