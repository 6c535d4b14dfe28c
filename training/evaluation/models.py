"""The models that `training.evaluate` samples, the space of their samples, and what image i of a seed is told."""

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
from gmflow_core.files.hub import is_published
from gmflow_core.source.source import GaussianMixtureSource
from training.data.shards import LatentDataset
from training.encoders.vae import SD_VAE


def image_seeds(seed: int, images: Sequence[int]) -> list[int]:
    """The seeds of images: the images' numbers for seed 0."""
    return [seed * 1_000_000_000 + i for i in images]


def image_labels(seeds: Sequence[int], classes: int) -> Tensor:
    """The label (n,) of each image, uniform over the classes, from its own seed."""
    draws = [
        torch.randint(classes, (1,), generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    return torch.cat(draws)


def image_modes(seeds: Sequence[int], source: GaussianMixtureSource) -> Tensor:
    """The mode (n,) of each image, by weight, from its own seed, but of other random numbers than its noise."""
    return source.draw_modes(
        len(seeds), [torch.Generator().manual_seed(zlib.crc32(b"mode %d" % seed)) for seed in seeds]
    )


@dataclass(frozen=True)
class Space:
    """What the samples are.

    Args:
        name: of the folder or the checkpoint that says so, for messages.
        kind: "pixels" or "latents".
        shape: (C, h, w).
        classes: their names; None if they are not known, as a checkpoint's labels are the modes of a mixture source.
        vae: folder or hub name of the latents' VAE, if it is known.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    classes: tuple[str, ...] | None
    vae: str | None

    @classmethod
    def of_data(cls, folder: Path) -> Space:
        """That of prepared data."""
        data = LatentDataset(folder, in_memory=False)
        return cls(str(folder), data.kind, data.shape, tuple(data.classes), data.index.get("vae"))

    @classmethod
    def of_checkpoints(cls, checkpoints: Sequence[str]) -> Space:
        """That of several checkpoints' samples: of the first that knows classes, or else of the first."""
        spaces = map(cls.of_checkpoint, checkpoints)
        first = next(spaces)
        return next((space for space in chain([first], spaces) if space.classes is not None), first)

    @classmethod
    def of_checkpoint(cls, checkpoint: str) -> Space:
        """That of a checkpoint's samples.

        Raises:
            ValueError: it does not say what they are.
        """
        metadata = read_metadata(checkpoint)
        config, data = metadata["config"], metadata["data"]
        kind = {"pixels": "pixels", "sd-vae": "latents", "rae": "latents"}.get(data.get("space"))
        if kind is None or "num_classes" not in config:
            raise ValueError(
                f"{checkpoint} does not say what its samples are; give --data, the prepared data of its training"
            )
        classes = None
        if (data.get("source") or {}).get("conditioning") != "mode":
            classes = tuple(data.get("labels") or map(str, range(config["num_classes"])))
        shape = (config["channels"], config["latent_size"], config["latent_size"])
        return cls(checkpoint, kind, shape, classes, SD_VAE if data["space"] == "sd-vae" else None)


class Model:
    """A checkpoint of the command: checked against the data, read when it is needed."""

    def __init__(self, checkpoint: str, data: Space):
        metadata = read_metadata(checkpoint)
        if metadata["model_class"] not in ("GMDiT", "DiTDH"):
            raise ValueError(
                f"{checkpoint} holds a {metadata['model_class']}; this command samples image models (GMDiT, DiTDH)"
            )
        config = metadata["config"]
        self.checkpoint, self.classes = checkpoint, config["num_classes"]
        self.record = metadata["data"].get("source")  # of the mixture source it was trained with
        self.unlabelled = bool(metadata["data"].get("unlabelled"))  # trained without classes
        self.conditioning = (self.record or {}).get(
            "conditioning"
        )  # by modes, or they are hidden, or None
        self.num_components, self.shape = (
            config["num_components"],
            (config["channels"], *[config["latent_size"]] * 2),
        )
        if (
            self.conditioning != "mode"
            and data.classes is not None
            and self.classes != len(data.classes)
        ):
            raise ValueError(
                f"{checkpoint} knows {self.classes} classes, but {data.name} has {len(data.classes)}; give --data what it was "
                "trained on"
            )
        if self.shape != data.shape:
            raise ValueError(
                f"{checkpoint} makes samples of shape {self.shape}, but {data.name} has {data.kind} of shape {data.shape}; "
                "give --data what it was trained on"
            )
        space = metadata["data"].get("space")
        if space is not None and (space == "pixels") != (data.kind == "pixels"):
            raise ValueError(
                f"{checkpoint} makes samples of {space}, but {data.name} has {data.kind}; give --data what it was trained on"
            )
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        files = (
            [file for _, file in published_weights(checkpoint)]
            if is_published(checkpoint)
            else [Path(checkpoint)]
        )
        for file in files:
            with open(file, "rb") as stream:
                while block := stream.read(2**24):
                    digest.update(block)
        self.fingerprint = digest.hexdigest()

    def load(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return load_checkpoint(self.checkpoint, device, dtype)[0]
