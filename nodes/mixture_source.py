"""Noise from a Gaussian-mixture source (MM-FM), and the modes it was drawn from as CONDITIONING."""

from __future__ import annotations

import os

import comfy.sample
import torch
from comfy_api.latest import io

from ..gmflow_core import load_source
from ..gmflow_core.source.files import read_source_metadata
from .comfyui.gm_sampler import generators
from .comfyui.options import SOURCE, class_conditioning
from .comfyui.source_noise import (
    BY_LIST,
    BY_WEIGHT,
    DRAWN,
    LIKELIEST,
    LoadedSource,
    SourceNoise,
    find_source,
    installed_sources,
    mode_list,
)

Source = io.Custom("GM_SOURCE")


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
        return io.NodeOutput(
            LoadedSource(source_name, load_source(path), read_source_metadata(path)["data"])
        )


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
                    "batch_size",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Images. Where latent_image is connected it has its own.",
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
                io.Noise.Output(
                    "noise", display_name="noise", tooltip="For SamplerCustomAdvanced."
                ),
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
                io.String.Output(
                    "numbers",
                    display_name="numbers",
                    tooltip="The modes' numbers, one for each item.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        source: LoadedSource,
        noise_seed: int,
        batch_size: int,
        choice: str,
        modes: str = "",
        latent_image=None,
    ) -> io.NodeOutput:
        if latent_image is None:
            if choice in (LIKELIEST, DRAWN):
                raise ValueError(
                    f"the modes of an image were asked for ({choice!r}); connect it to latent_image, encoded"
                )
            device = comfy.model_management.intermediate_device()
            latent_image = {
                "samples": torch.zeros((batch_size, *source.source.shape), device=device)
            }
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
        return io.NodeOutput(
            noise, conditioning, latent_image, ", ".join(map(str, chosen.tolist()))
        )
