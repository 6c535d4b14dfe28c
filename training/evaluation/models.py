"""Describe the models of an evaluation, the space of their samples, and the inputs of image i."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from gmflow_core.files.checkpoint import load_checkpoint, read_metadata
from gmflow_core.files.diffusers_folder import published_weights
from gmflow_core.files.diffusers_vae import own_vae
from gmflow_core.files.errors import FileError
from gmflow_core.files.hub import is_published, tidy_source
from gmflow_core.files.json_files import EDITED
from gmflow_core.models.vae import SD_VAE
from gmflow_core.source.source import GaussianMixtureSource
from training.data.shards import LatentDataset


def image_seeds(seed: int, images: Sequence[int]) -> list[int]:
    """Return the seed of each image: seed * 10^9 + its number."""
    return [seed * 1_000_000_000 + i for i in images]


def image_labels(seeds: Sequence[int], classes: int, shares: Tensor | None = None) -> Tensor:
    """Draw the label (n,) of each image from its own seed.

    Args:
        shares: how often each class is drawn, (classes,), of any sum; None: all alike.
    """
    generators = (torch.Generator().manual_seed(seed) for seed in seeds)
    if shares is None:
        return torch.cat([torch.randint(classes, (1,), generator=each) for each in generators])
    return torch.cat([torch.multinomial(shares, 1, generator=each) for each in generators])


def class_shares(labels: Tensor, classes: int) -> Tensor:
    """Return how often each class is in labels (n,), as float64 (classes,) of sum 1."""
    return torch.bincount(labels, minlength=classes).double() / len(labels)


def image_modes(seeds: Sequence[int], source: GaussianMixtureSource) -> Tensor:
    """Draw the mode (n,) of each image by weight; its generator is not that of the noise."""
    generators = [torch.Generator().manual_seed(zlib.crc32(b"mode %d" % seed)) for seed in seeds]
    return source.draw_modes(len(seeds), generators)


@dataclass(frozen=True)
class Space:
    """Space of the samples.

    Args:
        name: folder or checkpoint that the description comes from, for messages.
        kind: "pixels" or "latents".
        shape: (C, h, w).
        classes: names of the classes; None if unknown, as the labels of a checkpoint are the modes
            of a mixture source.
        vae: folder or hub name of the latents' VAE, if known.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    classes: tuple[str, ...] | None
    vae: str | None

    @classmethod
    def of_data(cls, folder: Path) -> Space:
        """Return the space of prepared data."""
        data = LatentDataset(folder, in_memory=False)
        return cls(str(folder), data.kind, data.shape, tuple(data.classes), data.index.get("vae"))

    @classmethod
    def of_checkpoints(cls, checkpoints: Sequence[str]) -> Space:
        """Return the space of the first checkpoint that knows classes, or else of the first."""
        spaces = map(cls.of_checkpoint, checkpoints)
        first = next(spaces)
        return next((space for space in chain([first], spaces) if space.classes is not None), first)

    @classmethod
    def of_checkpoint(cls, checkpoint: str) -> Space:
        """Return the space of a checkpoint's samples.

        Raises:
            ValueError: its metadata does not describe them.
        """
        metadata = read_metadata(checkpoint)
        config, data = metadata["config"], metadata["data"]
        kind = {"pixels": "pixels", "sd-vae": "latents", "rae": "latents"}.get(data.get("space"))
        if kind is None or "num_classes" not in config:
            raise ValueError(
                f"{checkpoint} does not say what its samples are; "
                "give --data, the prepared data of its training"
            )
        classes = None
        if (data.get("source") or {}).get("conditioning") != "mode":
            classes = tuple(data.get("labels") or map(str, range(config["num_classes"])))
        shape = (config["channels"], config["latent_size"], config["latent_size"])
        vae = None
        if data["space"] == "sd-vae":
            vae = str(own_vae(checkpoint) or SD_VAE)
        return cls(checkpoint, kind, shape, classes, vae)


SIZES = ("num_classes", "num_components", "channels", "latent_size")  # that a config states


class Model:
    """A checkpoint of the command, checked against the space of the data, loaded on demand.

    Args:
        checkpoint: file, folder in diffusers' layout, or hub name of one.
        data: space of the data.

    Attributes:
        classes: number of classes, or of modes.
        data: what the checkpoint says of its samples.
        record: description of the mixture source of its training, or None.
        unlabelled: trained without classes.
        conditioning: "mode" if the labels are modes, "hidden" if the modes are hidden, or None.
        fingerprint: SHA-256 of config and weights.

    Raises:
        ValueError: it is no image model, or its samples are of another space than the data.
    """

    def __init__(self, checkpoint: str, data: Space):
        metadata = read_metadata(checkpoint)
        if metadata["model_class"] not in ("GMDiT", "DiTDH"):
            raise ValueError(
                f"{checkpoint} holds a {metadata['model_class']}; "
                "this command samples image models (GMDiT, DiTDH)"
            )
        config = metadata["config"]
        missing = [name for name in SIZES if name not in config]
        if missing:
            raise FileError(checkpoint, f"has a config without {', '.join(missing)}", EDITED)
        self.checkpoint, self.classes = checkpoint, config["num_classes"]
        self.data = metadata["data"]
        self.record = self.data.get("source")
        self.unlabelled = bool(self.data.get("unlabelled"))
        self.conditioning = (self.record or {}).get("conditioning")
        self.num_components = config["num_components"]
        self.shape = (config["channels"], *[config["latent_size"]] * 2)
        self.check_space(self.data.get("space"), data)
        self.fingerprint = fingerprint(checkpoint, config)

    def check_space(self, space: str | None, data: Space) -> None:
        """Check that the samples are of the space of the data.

        Raises:
            ValueError: classes, shape or kind differ.
        """
        name = self.checkpoint
        by_class = self.conditioning != "mode" and data.classes is not None
        if by_class and self.classes != len(data.classes):
            raise ValueError(
                f"{name} knows {self.classes} classes, but {data.name} has "
                f"{len(data.classes)}; give --data what it was trained on"
            )
        if self.shape != data.shape:
            raise ValueError(
                f"{name} makes samples of shape {self.shape}, but {data.name} has {data.kind} of "
                f"shape {data.shape}; give --data what it was trained on"
            )
        if space is not None and (space == "pixels") != (data.kind == "pixels"):
            raise ValueError(
                f"{name} makes samples of {space}, but {data.name} has {data.kind}; "
                "give --data what it was trained on"
            )

    def load(self, device: torch.device) -> nn.Module:
        """Load the network, in float32."""
        return load_checkpoint(self.checkpoint, device)[0]


def fingerprint(checkpoint: str, config: dict) -> str:
    """Return the SHA-256 of a checkpoint's config and weight files."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    checkpoint = tidy_source(checkpoint)
    if is_published(checkpoint):
        files = [file for _, file in published_weights(checkpoint)]
    else:
        files = [Path(checkpoint)]
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(2**24):
                digest.update(block)
    return digest.hexdigest()
