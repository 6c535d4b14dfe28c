"""Mixture sources in the folders of ComfyUI, and noise drawn from them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Any

import comfy.sample
import folder_paths
import torch
from torch import Tensor

from ...gmflow_core import GaussianMixtureSource, ModeFrame
from .gm_model import image_latent
from .model_folders import shipped_sources
from .noise_check import mark_noise

FOLDER = "gmflow_sources"
BY_WEIGHT, BY_LIST, LIKELIEST, DRAWN = (
    "by weight",
    "from the list",
    "of the image: likeliest",
    "of the image: drawn",
)
ITEM = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")


def register_source_folder() -> None:
    """Make models/gmflow_sources known to ComfyUI, behind the folders of extra_model_paths.yaml."""
    default = os.path.join(folder_paths.models_dir, FOLDER)
    os.makedirs(default, exist_ok=True)
    folder_paths.add_model_folder_path(FOLDER, default)
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".safetensors"})


def installed_sources() -> dict[str, str]:
    """Name and path of every source that is installed or comes with the extension."""
    names = folder_paths.get_filename_list(FOLDER)
    installed = {name: path for name in names if (path := folder_paths.get_full_path(FOLDER, name))}
    return dict(
        sorted(
            {**{os.path.basename(path): path for path in shipped_sources()}, **installed}.items()
        )
    )


def find_source(name: str) -> str:
    """The path of an installed source.

    Raises:
        ValueError: there is none of that name.
    """
    sources = installed_sources()
    if name not in sources:
        raise ValueError(
            f"there is no mixture source {name!r} in {folder_paths.get_folder_paths(FOLDER)}; put it there and press R"
            + (f", or choose one of {', '.join(sources)}" if sources else "")
        )
    return sources[name]


@dataclass(frozen=True, eq=False)
class LoadedSource:
    """What a GM_SOURCE is.

    Args:
        data: what its samples are, see `gmflow_core.save_checkpoint`.
    """

    name: str
    source: GaussianMixtureSource
    data: dict[str, Any]

    def modes_of(self, latent: Tensor, coupling: str, noise: list[torch.Generator]) -> Tensor:
        """The modes that the images of a LATENT belong to, by the densities of the source itself: what assigns tokens has no
        part in it.

        Raises:
            ValueError: there is no image, or it does not fit the source.
        """
        self.source.require_shape(latent.shape[1:])
        if not latent.any():
            raise ValueError(
                "the modes of an image were asked for, and the latent is empty; connect VAE Encode to latent_image, or choose "
                f"{BY_WEIGHT!r}"
            )
        images = image_latent(self.source.shape[0], self.data).process_in(latent.float().cpu())
        return replace(self.source, assigner=None).posterior_modes(images, coupling, noise)


@dataclass(frozen=True, eq=False)
class SourceNoise:
    """A NOISE from modes that are chosen already: as ComfyUI's, it has `seed` and `generate_noise`.

    Args:
        modes: (n,), for each item of a batch; batches of a multiple of n repeat them, as they do conditionings.
        seed: of the noise around the modes' means.
    """

    source: GaussianMixtureSource
    modes: Tensor
    seed: int

    def modes_for(self, batch: int) -> Tensor:
        """
        Raises:
            ValueError: they do not fit a batch of that size.
        """
        if batch % len(self.modes):
            raise ValueError(
                f"{len(self.modes)} modes do not fit a batch of {batch} latents: its size must be {len(self.modes)} or a "
                "multiple; connect the latent that is sampled to latent_image of 'Mixture Source Noise' too"
            )
        return self.modes.repeat(batch // len(self.modes))

    def generate_noise(self, input_latent: dict) -> Tensor:
        """One draw for each item of a LATENT; around the mean it is the noise of Random Noise for that seed and batch index."""
        latent = input_latent["samples"]
        modes, indices = (
            self.modes_for(len(latent)),
            input_latent.get("batch_index") or range(len(latent)),
        )
        self.source.require_shape(latent.shape[1:])
        noise = comfy.sample.prepare_noise(latent.float(), self.seed, list(indices))
        return mark_noise(self.source.draw(modes, noise=noise), self)

    def frame(self, batch: int, device: torch.device) -> ModeFrame:
        """The coordinates in which the noise of a batch is N(0, I).

        Raises:
            ValueError: the modes do not fit the batch, or are diagonal.
        """
        frame = self.source.frame(self.modes_for(batch))
        return ModeFrame(frame.mean.to(device), frame.std.to(device))


def mode_list(text: str) -> list[int]:
    """The numbers of a list such as "3, 7, 7-9".

    Raises:
        ValueError: it is none, or empty.
    """
    numbers = []
    for item in filter(None, re.split(r"[,;\s]+", re.sub(r"\s*-\s*", "-", text.strip()))):
        match = ITEM.fullmatch(item)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(
                f"{item!r} in the list of modes is no mode and no range; give numbers, such as 3, 7, 10-12"
            )
        if last - first > 1e6:
            raise ValueError(
                f"{item!r} in the list of modes is longer than any batch; give a shorter range"
            )
        numbers += range(first, last + 1)
    if not numbers:
        raise ValueError(
            f"the list of modes is empty; give numbers, such as 3, 7, 10-12, or choose {BY_WEIGHT!r}"
        )
    return numbers
