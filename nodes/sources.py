"""Noise from a Gaussian-mixture source (MM-FM), and the modes it was drawn from as CONDITIONING."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.sample
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..gmflow_core import GaussianMixtureSource, ModeFrame, load_source
from ..gmflow_core.source import read_source_metadata
from .conditioning import class_conditioning
from .loaders import shipped_sources
from .models import image_latent
from .samplers import generators
from .seam import SOURCE, mark_noise

FOLDER = "gmflow_sources"
Source = io.Custom("GM_SOURCE")
BY_WEIGHT, BY_LIST, LIKELIEST, DRAWN = "by weight", "from the list", "of the image: likeliest", "of the image: drawn"
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
    return dict(sorted({**{os.path.basename(path): path for path in shipped_sources()}, **installed}.items()))


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
        modes, indices = self.modes_for(len(latent)), input_latent.get("batch_index") or range(len(latent))
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
            raise ValueError(f"{item!r} in the list of modes is no mode and no range; give numbers, such as 3, 7, 10-12")
        if last - first > 1e6:
            raise ValueError(f"{item!r} in the list of modes is longer than any batch; give a shorter range")
        numbers += range(first, last + 1)
    if not numbers:
        raise ValueError(f"the list of modes is empty; give numbers, such as 3, 7, 10-12, or choose {BY_WEIGHT!r}")
    return numbers


class GMFlowSourceLoader(io.ComfyNode):
    """A source from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowSourceLoader",
            display_name="Load Mixture Source",
            category="GMFlow",
            description="Loads a Gaussian mixture that was fitted to a model's training data: the model's noise is drawn from "
            "it (MM-FM).",
            inputs=[
                io.Combo.Input(
                    "source_name",
                    options=list(installed_sources()),
                    tooltip="A file that training.fit_source wrote, from the models/gmflow_sources folder (or the "
                    "gmflow_sources folders of extra_model_paths.yaml), or one that comes with the extension. It must be the "
                    "one that the model was trained with.",
                ),
            ],
            outputs=[Source.Output(display_name="source", tooltip="For Mixture Source Noise.")],
        )

    @classmethod
    def validate_inputs(cls, source_name: str) -> bool | str:
        """The choice must exist."""
        try:
            find_source(source_name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, source_name: str) -> list:
        """A file that was fitted anew is loaded again."""
        path = find_source(source_name)
        return [path, os.stat(path).st_mtime, os.stat(path).st_size]

    @classmethod
    def execute(cls, source_name: str) -> io.NodeOutput:
        path = find_source(source_name)
        return io.NodeOutput(LoadedSource(source_name, load_source(path), read_source_metadata(path)["data"]))


class GMFlowSourceNoise(io.ComfyNode):
    """Modes, and NOISE, CONDITIONING and LATENT that agree on them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowSourceNoise",
            display_name="Mixture Source Noise",
            category="GMFlow",
            description="Chooses a mode of the source for each item of the batch, and gives noise of that mode, and the modes "
            "as conditioning, for SamplerCustomAdvanced with any sampler.",
            inputs=[
                Source.Input("source", tooltip="The source that the model was trained with."),
                io.Int.Input(
                    "noise_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the modes and of the noise around them. An item depends on it and on its own place in the "
                    "batch only.",
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=4096, tooltip="Images. Where latent_image is connected it has its own."
                ),
                io.Combo.Input(
                    "choice",
                    options=[BY_WEIGHT, BY_LIST, LIKELIEST, DRAWN],
                    default=BY_WEIGHT,
                    tooltip="by weight: each mode as often as in the data. from the list: the modes below. of the image: the "
                    "mode that each latent_image belongs to, the likeliest one, or one drawn by its probability.",
                ),
                io.String.Input(
                    "modes",
                    default="",
                    optional=True,
                    placeholder="modes, such as 3, 7, 10-12",
                    tooltip="Numbers of modes, from 0, for 'from the list'; repeated until there is one for each item.",
                ),
                io.Latent.Input(
                    "latent_image",
                    optional=True,
                    tooltip="The latent that is sampled, where it is not to be an empty one: for image to image (set denoise "
                    "of the sigmas below 1), for inpainting, and for the mode of an image.",
                ),
            ],
            outputs=[
                io.Noise.Output("noise", display_name="noise", tooltip="For SamplerCustomAdvanced."),
                io.Conditioning.Output(
                    "conditioning",
                    display_name="modes",
                    tooltip="The modes, in the place of class labels: for the positive conditioning of models that were "
                    "trained to know them. Others take GM Class Labels or GM Unconditional, and the noise only.",
                ),
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="latent_image, or an empty one of the source's size and the batch's.",
                ),
                io.String.Output("numbers", display_name="numbers", tooltip="The modes' numbers, one for each item."),
            ],
        )

    @classmethod
    def execute(
        cls, source: LoadedSource, noise_seed: int, batch_size: int, choice: str, modes: str = "", latent_image=None
    ) -> io.NodeOutput:
        if latent_image is None:
            if choice in (LIKELIEST, DRAWN):
                raise ValueError(f"the modes of an image were asked for ({choice!r}); connect it to latent_image, encoded")
            device = comfy.model_management.intermediate_device()
            latent_image = {"samples": torch.zeros((batch_size, *source.source.shape), device=device)}
        samples = latent_image["samples"]
        indices = latent_image.get("batch_index") or range(len(samples))
        draws = generators(noise_seed, indices)
        if choice == BY_LIST:
            listed = mode_list(modes)
            source.source.moments([min(listed), max(listed)])  # or one is out of range
            chosen = torch.tensor([listed[index % len(listed)] for index in indices])
        elif choice == BY_WEIGHT:
            chosen = source.source.draw_modes(len(samples), draws)
        else:
            chosen = source.modes_of(samples, "hard" if choice == LIKELIEST else "soft", draws)
        noise = SourceNoise(source.source, chosen, noise_seed)
        conditioning = class_conditioning(chosen.tolist())
        conditioning[0][1][SOURCE] = noise
        return io.NodeOutput(noise, conditioning, latent_image, ", ".join(map(str, chosen.tolist())))
