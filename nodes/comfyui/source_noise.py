"""Noise drawn from a Gaussian-mixture source, as ComfyUI's NOISE."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.sample
import torch
from torch import Tensor

from ...gmflow_core import GaussianMixtureSource, ModeFrame, load_source
from ...gmflow_core.files.errors import quoted
from ...gmflow_core.source.files import read_source_metadata
from .generators import generators
from .gm_model import image_latent
from .guard import guarded
from .label_conditioning import SOURCE, class_conditioning
from .model_folders import find_source
from .noise_check import mark_noise
from .sizes import check_size

BY_WEIGHT, BY_LIST = "by weight", "from the list"
LIKELIEST, DRAWN = "of the image: likeliest", "of the image: drawn"
ITEM = re.compile(r"(\d{1,30})(?:-(\d{1,30}))?")
MOST_MODES = 1_000_000  # in a list, more than any batch


@dataclass(frozen=True, eq=False)
class LoadedSource:
    """Value of a GM_SOURCE wire.

    Args:
        data: a record of its samples, see `gmflow_core.save_checkpoint`.
    """

    name: str
    source: GaussianMixtureSource
    data: dict[str, Any]

    def modes_of(self, latent: Tensor, coupling: str, noise: list[torch.Generator]) -> Tensor:
        """Return the modes (B,) that the images of a LATENT belong to.

        The densities of the source decide; an assigner of tokens is not used.

        Args:
            coupling: "hard" returns the likeliest mode, "soft" draws one by its probability.

        Raises:
            ValueError: there is no image, or it does not fit the source.
        """
        self.source.require_shape(latent.shape[1:])
        if not latent.any():
            raise ValueError(
                "the latent is empty, and the modes of an image were asked for; connect VAE Encode "
                f"to latent_image, or choose {BY_WEIGHT!r}"
            )
        images = image_latent(self.source.shape[0], self.data).process_in(latent.float().cpu())
        return replace(self.source, assigner=None).posterior_modes(images, coupling, noise)


def load_installed(name: str) -> LoadedSource:
    """Load an installed mixture source.

    Raises:
        ValueError: there is none of that name, or the file is none.
    """
    path = find_source(name)
    return LoadedSource(name, load_source(path), read_source_metadata(path)["data"])


@dataclass(frozen=True, eq=False)
class SourceNoise:
    """A NOISE of chosen modes: like ComfyUI's, it has `seed` and `generate_noise`.

    Args:
        modes: (n,), one for each item of a batch; larger batches, of a multiple of n, repeat them,
            as they repeat conditionings.
        seed: seed of the noise around the modes' means.
    """

    source: GaussianMixtureSource
    modes: Tensor
    seed: int

    def modes_for(self, batch: int) -> Tensor:
        """Return the modes (batch,) of a batch.

        Raises:
            ValueError: they do not fit a batch of that size.
        """
        if batch % len(self.modes):
            raise ValueError(
                f"{len(self.modes)} modes do not fit a batch of {batch} latents: its size must be "
                f"{len(self.modes)} or a multiple; connect the latent that is sampled to "
                "latent_image of 'GM Mixture Source Noise' too"
            )
        return self.modes.repeat(batch // len(self.modes))

    @guarded
    def generate_noise(self, input_latent: dict) -> Tensor:
        """Draw noise for each item of a LATENT.

        Around the mean it is the noise of Random Noise for that seed and batch index.
        """
        latent = input_latent["samples"]
        modes = self.modes_for(len(latent))
        indices = input_latent.get("batch_index") or range(len(latent))
        self.source.require_shape(latent.shape[1:])
        noise = comfy.sample.prepare_noise(latent.float(), self.seed, list(indices))
        return mark_noise(self.source.draw(modes, noise=noise), self)

    def frame(self, batch: int, device: torch.device) -> ModeFrame:
        """Return the coordinates in which the noise of a batch is N(0, I).

        Raises:
            ValueError: the modes do not fit the batch, or are diagonal.
        """
        frame = self.source.frame(self.modes_for(batch))
        return ModeFrame(frame.mean.to(device), frame.std.to(device))

    def conditioning(self) -> list:
        """Return CONDITIONING that names the modes, in the place of class labels."""
        conditioning = class_conditioning(self.modes.tolist())
        conditioning[0][1][SOURCE] = self
        return conditioning


def choose_noise(
    loaded: LoadedSource, seed: int, choice: str, listed: str, latent: dict
) -> SourceNoise:
    """Choose a mode for each item of a LATENT, and return their noise.

    An item depends only on the seed and on its own index in the batch.

    Args:
        choice: BY_WEIGHT, BY_LIST, LIKELIEST or DRAWN.
        listed: the modes for BY_LIST, see `mode_list`.

    Raises:
        ValueError: modes or latent do not fit the source.
    """
    source, samples = loaded.source, latent["samples"]
    indices = latent.get("batch_index") or range(len(samples))
    draws = generators(seed, indices)
    if choice == BY_LIST:
        modes = mode_list(listed)
        source.moments([min(modes), max(modes)])  # raises if one is out of range
        chosen = torch.tensor([modes[index % len(modes)] for index in indices])
    elif choice == BY_WEIGHT:
        chosen = source.draw_modes(len(samples), draws)
    else:
        chosen = loaded.modes_of(samples, "hard" if choice == LIKELIEST else "soft", draws)
    return SourceNoise(source, chosen, seed)


def empty_latent(loaded: LoadedSource, batch: int, choice: str) -> dict:
    """Return an empty LATENT of the source's size.

    Raises:
        ValueError: `choice` asks for the modes of an image, or the latent would be too large.
    """
    if choice in (LIKELIEST, DRAWN):
        raise ValueError(
            f"no image is connected, and its modes were asked for ({choice!r}); connect VAE Encode "
            f"to latent_image, or choose {BY_WEIGHT!r}"
        )
    check_size("latents", batch, loaded.source.shape, "choose a smaller batch_size")
    device = comfy.model_management.intermediate_device()
    return {"samples": torch.zeros((batch, *loaded.source.shape), device=device)}


def mode_list(text: str) -> list[int]:
    """Return the numbers of a list such as "3, 7, 7-9".

    Raises:
        ValueError: the text is no such list, or is empty.
    """
    numbers = []
    text = re.sub(r" ?- ?", "-", " ".join(text.split()))
    for item in filter(None, re.split(r"[,; ]+", text)):
        match = ITEM.fullmatch(item)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if first > last:
            raise ValueError(
                f"{quoted(item)} in the list of modes is in the wrong order; give {last}-{first}"
            )
        if not match:
            raise ValueError(
                f"{quoted(item)} in the list of modes is no mode and no range; give numbers, such "
                "as 3, 7, 10-12"
            )
        if len(numbers) + last - first >= MOST_MODES:
            raise ValueError(
                f"{quoted(item)} makes the list of modes longer than any batch, {MOST_MODES:,}; "
                "give shorter ranges"
            )
        numbers += range(first, last + 1)
    if not numbers:
        raise ValueError(
            "the list of modes is empty; give numbers, such as 3, 7, 10-12, or choose "
            f"{BY_WEIGHT!r}"
        )
    return numbers
