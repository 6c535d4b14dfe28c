"""Load the samples of image training: prepared ones, or images that are encoded on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import Dataset

from training.common.devices import on_cpu
from training.data.class_names import read_class_names
from training.data.encoded_images import EncodedImages
from training.data.image_folder import list_images
from training.data.shards import INDEX, LatentDataset
from training.data.tokens import WithTokens, check_encoder
from training.encoders.load import load_vae
from training.loop.image_presets import ImageConfig


def load_data(config: ImageConfig) -> LatentDataset | EncodedImages:
    """Load the data of a run; with --encode every process loads the VAE too.

    Raises:
        FileNotFoundError: the data, the VAE or the file of class names is missing.
        ValueError: one of them is not as it should be.
    """
    if not config.encode:
        return LatentDataset(config.data)
    if (config.data / INDEX).exists():
        raise ValueError(
            f"--data {config.data} was written by training.prepare; leave --encode out, or give a "
            "folder of images"
        )
    state = PartialState(cpu=on_cpu(config.device))
    images = list_images(config.data)
    names = read_class_names(config.class_names, images.folders)
    with state.local_main_process_first():  # which downloads for the others
        vae = load_vae(config.vae, state.device)
    return EncodedImages(
        images,
        vae,
        names,
        name=config.vae,
        size=config.image_size,
        flip=config.flip,
        seed=config.seed,
        precision=config.encode_precision,
    )


def samples_of(
    dataset: LatentDataset | EncodedImages, fitted: dict[str, Any] | None, source: str | None
) -> Dataset:
    """Return what a loader reads, with tokens if a source finds a sample's mode by its token.

    Args:
        fitted: how that source was fitted; None if no tokens are needed.
        source: its name.

    Raises:
        FileNotFoundError: there are no tokens.
        ValueError: the tokens are not those of the source.
    """
    if isinstance(dataset, EncodedImages):
        if fitted is not None:
            dataset.find_tokens(fitted, source)
        return dataset.crops
    if fitted is None:
        return dataset
    check_encoder(Path(dataset.folder), fitted, source)
    return WithTokens(dataset)


def on_device(
    dataset: LatentDataset | EncodedImages, batch: Any, device: torch.device
) -> tuple[Tensor, ...]:
    """Return a loader's samples (n, C, h, w), labels (n,), and tokens if there are any."""
    if isinstance(dataset, EncodedImages):
        return dataset.encode(batch, device)
    return tuple(tensor.to(device, non_blocking=True) for tensor in batch)
