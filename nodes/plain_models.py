"""Nodes for models that predict no mixture: ordinary flow models, and those of epsilon or v."""

from __future__ import annotations

from comfy_api.latest import io

from .comfyui.plain_model import USUAL_SPREAD, with_spread
from .comfyui.schema import node_schema


class GMFlowSpread(io.ComfyNode):
    """A node that sets how sure a model without a mixture is taken to be."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowSpread",
            display_name="GM Spread",
            category="GMFlow/sampling",
            aliases="spread, variance, uncertainty, flow matching, k = 1, few step, guidance, sd3, "
            "z-image, wan, sdxl",
            description="For models that predict no mixture: how far from its mean the clean "
            "picture may lie. GM samplers and probabilistic guidance then use one Gaussian "
            "(K = 1) around the model's prediction. Few models need another value than the usual "
            "one.",
            inputs=[
                io.Model.Input("model", tooltip="Any model of images or videos from any loader."),
                io.Float.Input(
                    "spread",
                    default=0.0,
                    min=0.0,
                    max=3.0,
                    step=0.01,
                    tooltip="Standard deviation of the velocity, in units of the noise: at noise "
                    "level sigma the clean latent is taken to lie within spread * sigma of its "
                    f"mean. 0 is the usual one, {USUAL_SPREAD:g}. Higher makes few steps bolder, "
                    "and guidance of the same weight stronger; near 0 GM-ODE becomes Euler.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="For GM samplers, and the gm names in KSampler.")],
        )

    @classmethod
    def execute(cls, model, spread: float) -> io.NodeOutput:
        return io.NodeOutput(with_spread(model, spread))
