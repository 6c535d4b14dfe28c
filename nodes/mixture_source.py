"""Nodes for Gaussian-mixture sources (MM-FM): load one, and draw noise from it."""

from __future__ import annotations

from comfy_api.latest import io

from .comfyui.files import fingerprint
from .comfyui.model_folders import find_source, installed_sources
from .comfyui.schema import node_schema, seed_input
from .comfyui.solver_choice import no_effect
from .comfyui.source_noise import (
    BY_LIST,
    BY_WEIGHT,
    DRAWN,
    LIKELIEST,
    LoadedSource,
    choose_noise,
    empty_latent,
    load_installed,
)

Source = io.Custom("GM_SOURCE")


class GMFlowSourceLoader(io.ComfyNode):
    """A node that loads a mixture source from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowSourceLoader",
            display_name="GM Load Mixture Source",
            category="GMFlow/mixture source",
            aliases="mm-fm, gaussian mixture, gaussian, noise source, prior",
            description="Loads a Gaussian mixture that was fitted to a model's training data; the "
            "model's noise is drawn from it (MM-FM).",
            inputs=[
                io.Combo.Input(
                    "source_name",
                    options=list(installed_sources()),
                    tooltip="A file that training.fit_source wrote, from the models/gmflow_sources "
                    "folder (or the gmflow_sources folders of extra_model_paths.yaml), or one "
                    "shipped with the extension. It must be the one that the model was trained "
                    "with.",
                ),
            ],
            outputs=[Source.Output(display_name="source", tooltip="For GM Mixture Source Noise.")],
        )

    @classmethod
    def validate_inputs(cls, source_name: str | None = None) -> bool | str:
        """Check that the chosen source exists; a linked name is not known yet."""
        if source_name is not None:
            find_source(source_name)
        return True

    @classmethod
    def fingerprint_inputs(cls, source_name: str | None) -> list:
        """Return what changes when the file is fitted anew."""
        if source_name is None:
            return []
        return fingerprint(find_source(source_name))

    @classmethod
    def execute(cls, source_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_installed(source_name))


class GMFlowSourceNoise(io.ComfyNode):
    """A node that chooses modes, and makes NOISE, CONDITIONING and LATENT that agree on them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowSourceNoise",
            display_name="GM Mixture Source Noise",
            category="GMFlow/mixture source",
            aliases="mm-fm, gaussian mixture, gaussian, random noise, noise, prior, modes",
            description="Chooses a mode of the source for each item of the batch. Returns noise of "
            "these modes, and the modes as conditioning, for SamplerCustomAdvanced with any "
            "sampler.",
            inputs=cls._inputs(),
            outputs=[
                io.Noise.Output(
                    "noise", display_name="noise", tooltip="For SamplerCustomAdvanced."
                ),
                io.Conditioning.Output(
                    "conditioning",
                    display_name="modes",
                    tooltip="The modes, in the place of class labels: the positive conditioning "
                    "for models that were trained to know them. Other models take GM Class Labels "
                    "or GM Unconditional, and only the noise from here.",
                ),
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="latent_image, or an empty one of the source's size and batch_size.",
                ),
                io.String.Output(
                    "numbers",
                    display_name="numbers",
                    tooltip="The modes' numbers, one for each item.",
                ),
            ],
        )

    @classmethod
    def _inputs(cls) -> list[io.Input]:
        return [
            Source.Input("source", tooltip="The source that the model was trained with."),
            seed_input(
                "noise_seed",
                "Seed of the modes and of the noise around them. An item depends only on the seed "
                "and on its own place in the batch.",
            ),
            io.Int.Input(
                "batch_size",
                default=1,
                min=1,
                max=4096,
                tooltip="Number of images. If latent_image is connected, its own number counts.",
            ),
            io.Combo.Input(
                "choice",
                options=[BY_WEIGHT, BY_LIST, LIKELIEST, DRAWN],
                default=BY_WEIGHT,
                tooltip="by weight: each mode as often as in the data. from the list: the modes "
                "below. of the image: the mode that each latent_image belongs to, either the "
                "likeliest one, or one drawn by its probability.",
            ),
            io.String.Input(
                "modes",
                default="",
                optional=True,
                placeholder="modes, such as 3, 7, 10-12",
                tooltip="Numbers of modes, from 0, for 'from the list'; repeated until there is "
                "one for each item.",
            ),
            io.Latent.Input(
                "latent_image",
                optional=True,
                tooltip="The latent that is sampled, if it is not to be an empty one: for image to "
                "image (set denoise of the sigmas below 1), for inpainting, and for the mode of an "
                "image.",
            ),
        ]

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
        if modes.strip() and choice != BY_LIST:
            no_effect("modes", f"choice is {choice!r}; for this list choose {BY_LIST!r}")
        if latent_image is not None and batch_size not in (1, len(latent_image["samples"])):
            count = len(latent_image["samples"])
            no_effect(f"batch_size {batch_size}", f"latent_image has {count} of its own")
        if latent_image is None:
            latent_image = empty_latent(source, batch_size, choice)
        noise = choose_noise(source, noise_seed, choice, modes, latent_image)
        numbers = ", ".join(map(str, noise.modes.tolist()))
        return io.NodeOutput(noise, noise.conditioning(), latent_image, numbers)
