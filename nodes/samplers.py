"""Nodes for GM samplers: SAMPLER and SIGMAS for SamplerCustomAdvanced, and one all-in-one node."""

from __future__ import annotations

from comfy_api.latest import io

from ..gmflow_core.sampling.solvers import FINAL_STEP_SIZE
from .comfyui.adapter_info import final_step_size_for
from .comfyui.gm_sampler import OWN, gm_sampler, gm_sigmas
from .comfyui.plain_model import sampling_of
from .comfyui.sample_latent import sample_latent
from .comfyui.schema import (
    ADVANCED,
    conditioning_inputs,
    denoise_input,
    final_step_size_input,
    model_input,
    node_schema,
    order_input,
    policy_inputs,
    sampler_output,
    seed_input,
    shift_input,
    sigmas_output,
    solver_input,
    steps_input,
    stochasticity_of,
)
from .comfyui.time_shift import own_sigmas


class GMFlowODESampler(io.ComfyNode):
    """A node that makes a SAMPLER of GM-ODE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowODESampler",
            display_name="GM ODE Sampler",
            category="GMFlow/sampling",
            aliases="sampler, gm-ode, ode, deterministic, gaussian, few step",
            description="Deterministic: between two network calls every pixel follows the ODE of "
            "its predicted mixture. For SamplerCustomAdvanced, with GM Sigmas of the same shift.",
            inputs=[
                order_input(),
                io.Int.Input(
                    "substeps",
                    default=8,
                    min=1,
                    max=1024,
                    tooltip="GM-ODE's small steps between two network calls. They cost little "
                    "compared to the network: 8 are plenty for 4 or more network calls; use 16 for "
                    "2, and 32 for 1.",
                ),
                io.Combo.Input(
                    "spacing",
                    options=["time", "sigma"],
                    default="time",
                    optional=True,
                    tooltip="Substeps of equal size in unshifted time, as in the paper's code, or "
                    "in sigma. They differ only with a time shift.",
                    **ADVANCED,
                ),
                shift_input(default=0.0, lowest=0.0, optional=True, **ADVANCED),
            ],
            outputs=[sampler_output()],
        )

    @classmethod
    def execute(
        cls, order: int, substeps: int, spacing: str = "time", shift: float = 0.0
    ) -> io.NodeOutput:
        settings = {"order": order, "substeps": substeps, "spacing": spacing}
        return io.NodeOutput(gm_sampler("gm-ode", shift, **settings))


class GMFlowSDESampler(io.ComfyNode):
    """A node that makes a SAMPLER of GM-SDE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowSDESampler",
            display_name="GM SDE Sampler",
            category="GMFlow/sampling",
            aliases="sampler, gm-sde, sde, stochastic, ancestral, gaussian, few step",
            description="Stochastic: each step draws the clean latent from the predicted mixture, "
            "then adds noise back. For SamplerCustomAdvanced, with GM Sigmas.",
            inputs=[
                order_input(),
                io.Boolean.Input(
                    "spectrum",
                    default=True,
                    optional=True,
                    tooltip="Draw with the model's spectrum network, if it has one: pixels vary "
                    "together. Off: every pixel on its own, which is grainy in 1 or 2 steps and "
                    "may be better in 4 or more.",
                    **ADVANCED,
                ),
            ],
            outputs=[sampler_output()],
        )

    @classmethod
    def execute(cls, order: int, spectrum: bool = True) -> io.NodeOutput:
        settings = {} if spectrum else {"spectrum": None}
        return io.NodeOutput(gm_sampler("gm-sde", order=order, **settings))


class GMFlowPolicySampler(io.ComfyNode):
    """A node that makes a SAMPLER of pi-Flow's policy sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowPolicySampler",
            display_name="GM Policy Sampler",
            category="GMFlow/sampling",
            aliases="sampler, pi-flow, piflow, policy, few step, 4 steps, turbo, lightning, "
            "distilled, flux, qwen",
            description="pi-Flow's sampler for models with a GM adapter: between two network calls "
            "every pixel follows the policy that the first one predicted. For "
            "SamplerCustomAdvanced, with GM Policy Sigmas.",
            inputs=[
                io.Int.Input(
                    "substeps",
                    default=128,
                    min=1,
                    max=4096,
                    tooltip="Small steps along the predicted policy, for the whole way from noise "
                    "to image; each network call gets its share. The adapters were made with 128.",
                ),
                *policy_inputs(),
            ],
            outputs=[sampler_output()],
        )

    @classmethod
    def execute(cls, substeps: int, temperature: float, stochasticity: float) -> io.NodeOutput:
        settings = {"temperature": temperature or None}
        settings["stochasticity"] = stochasticity_of(stochasticity)
        return io.NodeOutput(gm_sampler("gm-policy", substeps=substeps, **settings))


class GMFlowPolicySigmas(io.ComfyNode):
    """A node that makes the SIGMAS for the policy sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowPolicySigmas",
            display_name="GM Policy Sigmas",
            category="GMFlow/sampling",
            aliases="scheduler, schedule, sigmas, pi-flow, piflow, 4 steps, few step, flux, qwen",
            description="The time grid that a GM adapter is made for: equal steps, a last one of "
            "its own size (half as long for pi-Flow's), and the model's own time shift.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to sample: it sets the time shift if shift is 0."
                ),
                steps_input(default=4),
                shift_input(default=0.0, lowest=0.0),
                final_step_size_input(f"; {FINAL_STEP_SIZE:g} without an adapter"),
                denoise_input(),
            ],
            outputs=[sigmas_output()],
        )

    @classmethod
    def execute(
        cls, model, steps: int, shift: float, final_step_size: float, denoise: float
    ) -> io.NodeOutput:
        final_step_size = final_step_size or final_step_size_for(model, "gm-policy")
        sigmas = own_sigmas(sampling_of(model), steps, shift, denoise, final_step_size)
        return io.NodeOutput(sigmas)


class GMFlowSigmas(io.ComfyNode):
    """A node that makes the SIGMAS for the GM samplers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowSigmas",
            display_name="GM Sigmas",
            category="GMFlow/sampling",
            aliases="scheduler, schedule, sigmas, steps, shift, denoise",
            description="A uniform time grid from 1 to 0, shifted on request. GM models are "
            "trained and measured with it.",
            inputs=[
                steps_input(default=8),
                shift_input(default=1.0, lowest=0.0),
                denoise_input(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Needed for shift 0, and for models that predict epsilon or v (SD 1.5, "
                    "SDXL), which count noise in units of their own.",
                ),
            ],
            outputs=[sigmas_output()],
        )

    @classmethod
    def execute(cls, steps: int, shift: float, denoise: float, model=None) -> io.NodeOutput:
        if model is None:
            if not shift:
                raise ValueError(
                    "no shift: 0 stands for the model's own; connect the model to GM Sigmas, or "
                    "set shift to 1 or more"
                )
            return io.NodeOutput(gm_sigmas(steps, shift, denoise))
        return io.NodeOutput(own_sigmas(sampling_of(model), steps, shift, denoise))


class GMFlowSampler(io.ComfyNode):
    """A node that samples a LATENT with a MODEL, without further nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowSampler",
            display_name="GM Sampler",
            category="GMFlow/sampling",
            aliases="ksampler, sampler, few step, 4 steps, turbo, lightning, distilled, pi-flow, "
            "piflow, flux, qwen, gaussian mixture, gaussian, flow matching, gm-ode, "
            "gm-sde, gm-policy",
            description="Noise, sigmas, solver and guider in one node. Left alone, it chooses what "
            "suits the model: the policy sampler with the adapter's own steps behind GM Adapter, "
            "GM-ODE in 4 steps for other models.",
            inputs=[
                model_input(),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent to fill, or one to change (denoise below 1). GM Class "
                    "Labels gives one of the model's size. For the checkerboard every latent pixel "
                    "is one point: Empty Latent Image of 1024 x 1024 gives 16,384 points per batch "
                    "item.",
                ),
                seed_input(
                    "seed",
                    "Seed of the initial noise, and of the noise that stochastic samplers add.",
                ),
                steps_input(default=0),
                *cls._solver_inputs(),
                shift_input(default=0.0, lowest=0.0, **ADVANCED),
                denoise_input(),
                *conditioning_inputs(" GM Probabilistic Guidance before this node sets the rest."),
                final_step_size_input(
                    "; with other solvers than gm-policy it is 1", optional=True, **ADVANCED
                ),
                *policy_inputs("For gm-policy. ", optional=True, **ADVANCED),
            ],
            outputs=[io.Latent.Output(tooltip="The samples.")],
        )

    @classmethod
    def _solver_inputs(cls) -> list[io.Input]:
        return [
            solver_input(
                "auto is gm-policy behind GM Adapter, and gm-ode for other models. gm-ode "
                "is deterministic, gm-sde stochastic; gm-policy is made for models with a GM "
                "adapter. euler, dpmpp-2m and uni-pc follow only the mean, as the stock samplers "
                "of these names do, for comparison; but a KSampler takes other sigmas for uni_pc: "
                "those of one step more, without the last but one.",
            ),
            order_input(**ADVANCED),
            io.Int.Input(
                "substeps",
                default=OWN,
                min=OWN,
                max=4096,
                tooltip="Small steps along the predicted mixture: between two network calls for "
                "gm-ode, over the whole way for gm-policy. They cost little compared to the "
                "network. 0 uses the usual number: 8 for gm-ode, 128 for gm-policy.",
                **ADVANCED,
            ),
        ]

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
        temperature=0.0,
        stochasticity=0.0,
        **optional,
    ) -> io.NodeOutput:
        settings = {"substeps": substeps or None, "temperature": temperature or None, **optional}
        settings["stochasticity"] = stochasticity_of(stochasticity)
        times = {"shift": shift, "denoise": denoise}
        return io.NodeOutput(
            sample_latent(
                model, latent_image, seed, steps, solver, order=order, **times, **settings
            )
        )
