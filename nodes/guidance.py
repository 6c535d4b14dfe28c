"""Nodes for guidance: probabilistic guidance (GMFlow), and autoguidance (Karras et al. 2024)."""

from __future__ import annotations

from comfy_api.latest import io

from .comfyui.autoguider import AutoGuider
from .comfyui.guiders import gm_guider, guided, guided_interval
from .comfyui.schema import (
    guidance_inputs,
    guider_output,
    interval_inputs,
    model_input,
    node_schema,
    weight_input,
)
from .comfyui.solver_choice import no_effect


class GMFlowAutoguidance(io.ComfyNode):
    """A node that makes a GUIDER for autoguidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowAutoguidance",
            display_name="GM Autoguidance",
            category="GMFlow/guidance",
            aliases="cfg, guidance, guider, weak model, bad model guidance, karras",
            description="Steers away from what a weaker model of the same thing would do, for "
            "SamplerCustomAdvanced. The guide is a smaller or less trained model, or the model "
            "itself, weakened. It works with any two models of the same latents, such as FLUX, and "
            "needs no negative conditioning.",
            inputs=[
                io.Model.Input("model", tooltip="The model to sample."),
                io.Model.Input(
                    "guide",
                    tooltip="A weaker model of the same latents: smaller, less trained, with a "
                    "LoRA at negative strength, or with a patch that spoils its attention. A guide "
                    "from a file of its own costs memory, but no time to switch between the two.",
                ),
                io.Conditioning.Input("positive", tooltip="What to generate."),
                io.Float.Input(
                    "scale",
                    default=1.5,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="1 is off, and the guide is not even loaded; MM-FM was measured with "
                    "1.5. The prediction is guide + scale * (model - guide).",
                ),
                *interval_inputs("the guide is not called"),
                io.Conditioning.Input(
                    "guide_positive",
                    optional=True,
                    tooltip="Another conditioning for the guide, if it needs one; by default it "
                    "gets the same.",
                ),
            ],
            outputs=[guider_output()],
        )

    @classmethod
    def execute(
        cls,
        model,
        guide,
        positive,
        scale: float,
        start_percent: float,
        end_percent: float,
        guide_positive=None,
    ) -> io.NodeOutput:
        interval = guided_interval(model, start_percent, end_percent)
        if scale == 1:
            no_effect("guide", "scale is 1")
        return io.NodeOutput(
            AutoGuider(model, guide, positive, guide_positive or positive, scale, interval)
        )


class GMFlowProbabilisticGuidance(io.ComfyNode):
    """A node that makes the cfg of a MODEL probabilistic."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowProbabilisticGuidance",
            display_name="GM Probabilistic Guidance",
            category="GMFlow/guidance",
            aliases="cfg, guidance, negative, rescale cfg, apg, saturation, oversaturated",
            description="Makes the cfg of every sampler and guider after it the weight w in [0, 1) "
            "of probabilistic guidance: 0 is off, 0.1 to 0.5 are usual. It steers the predicted "
            "distribution instead of extrapolating the velocity, so that hardly more values leave "
            "their range. Stock samplers follow the guided mean, GM samplers the whole guided "
            "mixture.",
            inputs=[model_input(), *guidance_inputs()],
            outputs=[
                io.Model.Output(
                    tooltip="The model with probabilistic cfg: set cfg to a weight in [0, 1), such "
                    "as 0.2."
                )
            ],
        )

    @classmethod
    def execute(
        cls, model, orthogonal: float, start_percent: float, end_percent: float
    ) -> io.NodeOutput:
        return io.NodeOutput(guided(model, orthogonal, start_percent, end_percent))


class GMFlowGuider(io.ComfyNode):
    """A node that makes a GUIDER for probabilistic guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowGuider",
            display_name="GM Guider",
            category="GMFlow/guidance",
            aliases="cfg, cfg guider, guidance, negative, probabilistic guidance, saturation",
            description="Probabilistic guidance for SamplerCustomAdvanced: steers the predicted "
            "distribution instead of extrapolating the velocity, so that hardly more values leave "
            "their range.",
            inputs=[
                model_input(),
                io.Conditioning.Input("positive", tooltip="What to generate."),
                weight_input("scale", default=0.2),
                *guidance_inputs(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What to steer away from. If nothing is connected, models of classes "
                    "steer away from no class.",
                ),
            ],
            outputs=[guider_output()],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        scale: float,
        orthogonal: float,
        start_percent: float,
        end_percent: float,
        negative=None,
    ) -> io.NodeOutput:
        model = guided(model, orthogonal, start_percent, end_percent)
        return io.NodeOutput(gm_guider(model, positive, negative, scale))
