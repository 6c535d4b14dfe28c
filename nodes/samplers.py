"""GM samplers: as SAMPLER and SIGMAS for SamplerCustomAdvanced, and one all-in-one node."""

from __future__ import annotations

from dataclasses import replace

import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from ..gmflow_core.sampling.solvers import FINAL_STEP_SIZE, SOLVERS
from .comfyui.adapter import own_shift
from .comfyui.gm_model import GMModel
from .comfyui.gm_sampler import OWN, RATIOS, fitting_latent, gm_sampler, gm_sigmas
from .comfyui.guiders import gm_guider, guided
from .comfyui.options import SOURCE
from .comfyui.probabilistic_cfg import has_probabilistic_guidance
from .guidance import TIPS as GUIDANCE_TIPS

NOTHING = [
    [torch.zeros(1, 1, 1), {}]
]  # CONDITIONING for models that take none; others ask for labels
TIPS = {
    "order": "2 corrects every mixture with the one before it; 1 takes them as they are. For gm-ode and gm-sde.",
    "substeps": "GM-ODE's small steps between two network calls. They cost little beside the network: 8 are plenty for 4 "
    "or more network calls; take 16 for 2, and 32 for 1.",
    "policy_substeps": "Small steps along the predicted policy, for the whole way from noise to image; each network call gets "
    "its share. 128 is what the adapters were made with.",
    "steps": "Network calls. GM samplers are made for 4 to 8.",
    "shift": "Time shift: above 1 spends more of the steps at high noise. 0 takes the model's own: 1 for the models of this "
    "extension, 3.2 with a GM adapter.",
    "final_step_size": "Size of the last step beside the others. Models with a GM adapter are made for 0.5.",
    "temperature": "Below 1 it sharpens the mixture at all steps but the last. 0 is automatic: a tenth of the steps but one, "
    "at most 1 (0.3 for 4 steps). Where the sigmas are split over several samplers set it, as each counts its own steps.",
    "stochasticity": "0 is deterministic. Above it every step goes further and adds fresh noise; 1 is as stochastic as the SDE "
    "of DDPM.",
    "denoise": "1 starts from pure noise; less starts from the latent with that share of noise added (image to image).",
    "seed": "Seed of the initial noise, and of the noise that stochastic samplers add.",
}


class GMFlowODESampler(io.ComfyNode):
    """GM-ODE as SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowODESampler",
            display_name="GM-ODE Sampler",
            category="GMFlow",
            description="Deterministic: between two network calls every pixel follows the ODE of its predicted mixture. "
            "For SamplerCustomAdvanced, with GM Sigmas.",
            inputs=[
                io.Int.Input("order", default=2, min=1, max=2, tooltip=TIPS["order"]),
                io.Int.Input("substeps", default=8, min=1, max=1024, tooltip=TIPS["substeps"]),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced or SamplerCustom.")],
        )

    @classmethod
    def execute(cls, order: int, substeps: int) -> io.NodeOutput:
        return io.NodeOutput(gm_sampler("gm-ode", order=order, substeps=substeps))


class GMFlowSDESampler(io.ComfyNode):
    """GM-SDE as SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowSDESampler",
            display_name="GM-SDE Sampler",
            category="GMFlow",
            description="Stochastic: each step draws the clean latent from the predicted mixture, then adds noise back. "
            "For SamplerCustomAdvanced, with GM Sigmas.",
            inputs=[io.Int.Input("order", default=2, min=1, max=2, tooltip=TIPS["order"])],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced or SamplerCustom.")],
        )

    @classmethod
    def execute(cls, order: int) -> io.NodeOutput:
        return io.NodeOutput(gm_sampler("gm-sde", order=order))


class GMFlowPolicySampler(io.ComfyNode):
    """The GM policy as SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowPolicySampler",
            display_name="GM Policy Sampler",
            category="GMFlow",
            description="pi-Flow's sampler for models with a GM adapter: between two network calls every pixel follows the "
            "policy that the first one predicted. For SamplerCustomAdvanced, with GM Policy Sigmas.",
            inputs=[
                io.Int.Input(
                    "substeps", default=128, min=1, max=4096, tooltip=TIPS["policy_substeps"]
                ),
                io.Float.Input(
                    "temperature",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=TIPS["temperature"],
                ),
                io.Float.Input(
                    "stochasticity",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip=TIPS["stochasticity"],
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced or SamplerCustom.")],
        )

    @classmethod
    def execute(cls, substeps: int, temperature: float, stochasticity: float) -> io.NodeOutput:
        settings = {
            "substeps": substeps,
            "temperature": temperature or None,
            "stochasticity": stochasticity,
        }
        return io.NodeOutput(gm_sampler("gm-policy", **settings))


class GMFlowPolicySigmas(io.ComfyNode):
    """The policy sampler's time grid."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowPolicySigmas",
            display_name="GM Policy Sigmas",
            category="GMFlow",
            description="The time grid that GM adapters are made for: equal steps and a shorter last one, in the model's own "
            "time shift.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that is sampled: its time shift counts."
                ),
                io.Int.Input("steps", default=4, min=1, max=1000, tooltip=TIPS["steps"]),
                io.Float.Input(
                    "shift", default=0.0, min=0.0, max=100.0, step=0.01, tooltip=TIPS["shift"]
                ),
                io.Float.Input(
                    "final_step_size",
                    default=FINAL_STEP_SIZE,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip=TIPS["final_step_size"],
                ),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=TIPS["denoise"]
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="For SamplerCustomAdvanced or SamplerCustom.")],
        )

    @classmethod
    def execute(
        cls, model, steps: int, shift: float, final_step_size: float, denoise: float
    ) -> io.NodeOutput:
        return io.NodeOutput(
            gm_sigmas(
                steps,
                shift or own_shift(model.get_model_object("model_sampling")),
                denoise,
                final_step_size,
            )
        )


class GMFlowSigmas(io.ComfyNode):
    """The GM samplers' time grid."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowSigmas",
            display_name="GM Sigmas",
            category="GMFlow",
            description="A uniform time grid from 1 to 0, shifted if asked: what GM models are trained and measured with.",
            inputs=[
                io.Int.Input("steps", default=8, min=1, max=1000, tooltip=TIPS["steps"]),
                io.Float.Input(
                    "shift", default=1.0, min=0.01, max=100.0, step=0.01, tooltip=TIPS["shift"]
                ),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=TIPS["denoise"]
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="For SamplerCustomAdvanced or SamplerCustom.")],
        )

    @classmethod
    def execute(cls, steps: int, shift: float, denoise: float) -> io.NodeOutput:
        return io.NodeOutput(gm_sigmas(steps, shift, denoise))


class GMFlowSampler(io.ComfyNode):
    """MODEL and LATENT in, LATENT out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowSampler",
            display_name="GM Sampler",
            category="GMFlow",
            description="Noise, sigmas, solver and guider in one node, for a quick start.",
            inputs=[
                io.Model.Input("model", tooltip="A model from Load GM Model or GM Adapter."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent to fill, or one to change (denoise below 1). GM Class Labels gives one of the "
                    "model's size. For the checkerboard every latent pixel is one point: Empty Latent Image of 1024 x 1024 "
                    "gives 16,384 points per batch item.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip=TIPS["seed"],
                ),
                io.Int.Input("steps", default=4, min=1, max=1000, tooltip=TIPS["steps"]),
                io.Combo.Input(
                    "solver",
                    options=list(SOLVERS),
                    default="gm-ode",
                    tooltip="gm-ode is deterministic, gm-sde stochastic; gm-policy is for models with a GM adapter. euler and "
                    "dpmpp-2m (DPM-Solver++ of second order) follow the mean only, as stock samplers do, for comparison.",
                ),
                io.Int.Input("order", default=2, min=1, max=2, tooltip=TIPS["order"]),
                io.Int.Input(
                    "substeps",
                    default=OWN,
                    min=OWN,
                    max=4096,
                    tooltip="Small steps along the predicted mixture, for gm-ode between two network calls, for gm-policy in "
                    "all. They cost little beside the network. 0 takes the usual number: 8 for gm-ode, 128 for gm-policy.",
                ),
                io.Float.Input(
                    "shift", default=0.0, min=0.0, max=100.0, step=0.01, tooltip=TIPS["shift"]
                ),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=TIPS["denoise"]
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="What to generate: from GM Class Labels, or a prompt for models with a GM adapter; leave it open "
                    "for models that take no conditioning.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What guidance steers away from; no class if nothing is connected to a model of classes.",
                ),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    optional=True,
                    tooltip=GUIDANCE_TIPS["scale"]
                    + " GM Probabilistic Guidance in front of this node sets the rest.",
                ),
                io.Float.Input(
                    "final_step_size",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip=TIPS["final_step_size"]
                    + " 0 takes the solver's own: 0.5 for gm-policy, 1 for the others.",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="For gm-policy. " + TIPS["temperature"],
                ),
                io.Float.Input(
                    "stochasticity",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    optional=True,
                    tooltip="For gm-policy. " + TIPS["stochasticity"],
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The samples.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        latent_image,
        seed,
        steps,
        solver,
        order,
        substeps,
        shift,
        denoise,
        positive=None,
        negative=None,
        guidance=0.0,
        final_step_size=0.0,
        temperature=0.0,
        stochasticity=0.0,
    ) -> io.NodeOutput:
        shift = shift or own_shift(model.get_model_object("model_sampling"))
        final_step_size = final_step_size or (FINAL_STEP_SIZE if solver == "gm-policy" else 1.0)
        sigmas = gm_sigmas(steps, shift, denoise, final_step_size)
        if not len(sigmas):
            return io.NodeOutput(latent_image)
        if positive is None and not isinstance(model.model, GMModel):
            raise ValueError(
                f"this model ({type(model.model).__name__}) is conditioned on text; connect a prompt (CLIPTextEncode) "
                "to positive"
            )
        samples = fitting_latent(model, latent_image)
        batch_index = latent_image.get("batch_index")
        source = (positive or NOTHING)[0][1].get(SOURCE)
        if source is None:
            noise = comfy.sample.prepare_noise(samples, seed, batch_index)
        else:
            noise = replace(source, seed=seed).generate_noise({**latent_image, "samples": samples})
        if guidance and not has_probabilistic_guidance(model):
            model = guided(model)
        settings = {
            "order": order,
            "substeps": substeps or None,
            "temperature": temperature or None,
            "stochasticity": stochasticity,
        }
        samples = gm_guider(
            model, NOTHING if positive is None else positive, negative, guidance
        ).sample(
            noise,
            samples,
            gm_sampler(solver, shift, **settings),
            sigmas,
            denoise_mask=latent_image.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        result = {key: value for key, value in latent_image.items() if key not in RATIOS}
        return io.NodeOutput(
            {**result, "samples": samples.to(comfy.model_management.intermediate_device())}
        )
