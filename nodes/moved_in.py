"""A node for workflows that were made for ComfyUI-piFlow."""

from __future__ import annotations

from comfy_api.latest import io

from .comfyui.moved_in import sample_as_piflow
from .comfyui.schema import denoise_input, node_schema, seed_input

MOST_STEPS = 10_000


class GMFlowPiFlowSampler(io.ComfyNode):
    """A node that samples with the settings of ComfyUI-piFlow's sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowPiFlowSampler",
            display_name="GM Sampler (pi-Flow settings)",
            category="GMFlow/sampling",
            aliases="pi-flow sampler, piflow sampler, comfyui-piflow",
            description="GM Sampler with the settings of ComfyUI-piFlow's sampler, for workflows "
            "made with it. In new workflows use GM Sampler.",
            is_deprecated=True,  # left out of the list of nodes
            inputs=cls._inputs(),
            outputs=[io.Latent.Output(tooltip="The samples.")],
        )

    @classmethod
    def _inputs(cls) -> list[io.Input]:
        return [
            io.Model.Input("model", tooltip="A model with a GM adapter on it."),
            seed_input("seed", "Seed of the initial noise, and of the noise of stochastic steps."),
            io.Int.Input(
                "steps",
                default=4,
                min=1,
                max=MOST_STEPS,
                tooltip="Network calls: as many as the adapter's name says, or more.",
            ),
            io.Int.Input(
                "substeps",
                default=128,
                min=1,
                max=MOST_STEPS,
                tooltip="Small steps along the predicted policy, for the whole way from noise to "
                "image.",
            ),
            io.Float.Input(
                "final_step_size",
                default=0.5,
                min=0.0,
                max=1.0,
                step=0.01,
                tooltip="Size of the last step relative to the others (final_step_size_scale in "
                "ComfyUI-piFlow).",
            ),
            io.Float.Input(
                "stochasticity",
                default=0.0,
                min=0.0,
                max=1_000_000.0,
                step=0.01,
                tooltip="0 is deterministic; 1 is as stochastic as the SDE of DDPM "
                "(diffusion_coefficient in ComfyUI-piFlow).",
            ),
            io.Combo.Input(
                "gm_temperature",
                options=["auto", "manual"],
                default="auto",
                tooltip="auto: 0.1 * (steps - 1), at most 1. manual: the temperature below.",
            ),
            io.Float.Input(
                "temperature",
                default=1.0,
                min=0.0,
                max=1.0,
                step=0.01,
                tooltip="Below 1 it sharpens the mixture at all steps but the last; used if "
                "gm_temperature is manual.",
            ),
            io.Conditioning.Input("positive", tooltip="The prompt."),
            io.Latent.Input(
                "latent_image", tooltip="An empty latent, or one to change (denoise below 1)."
            ),
            denoise_input(),
        ]

    @classmethod
    def execute(cls, model, positive, latent_image, **settings) -> io.NodeOutput:
        return io.NodeOutput(sample_as_piflow(model, positive, latent_image, **settings))
