"""GM samplers: as SAMPLER and SIGMAS for SamplerCustomAdvanced, and one all-in-one node."""

from __future__ import annotations

import inspect
import logging
import zlib
from collections.abc import Iterable
from dataclasses import replace

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io
from torch import Tensor

from ..gmflow_core import DXPolicy, flow_sigmas, unshift_time
from ..gmflow_core.policy import Policy
from ..gmflow_core.solvers import FINAL_STEP_SIZE, MEAN_SOLVERS, SOLVERS, SUBSTEPS, solve, usual_temperature
from .guidance import TIPS as GUIDANCE_TIPS
from .guidance import gm_guider, guided
from .models import GMModel
from .notices import notice
from .seam import SOURCE, Adapter, MixtureModel, PointShape, has_probabilistic_guidance, own_shift

NOTHING = [[torch.zeros(1, 1, 1), {}]]  # CONDITIONING for models that take none; others ask for labels

RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # keys of a LATENT
OWN = 0  # of a setting: the model's, or the solver's, own value
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


def gm_sampler(solver: str, shift: float = OWN, **settings) -> comfy.samplers.KSAMPLER:
    """A SAMPLER that runs a solver of gmflow_core.

    Args:
        solver: one of SOLVERS.
        shift: time shift of the sigmas; the model's own if 0.
        settings: for `solve`.
    """

    def run(model, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, callback=None, disable=None) -> Tensor:
        if len(sigmas) < 2:
            return x
        if not 0 <= sigmas.min() <= sigmas.max() <= 1 or (sigmas.diff() >= 0).any():
            raise ValueError(
                f"GM samplers need sigmas that fall in every step, from at most 1 to 0, and these {len(sigmas) - 1} steps go "
                f"from {sigmas[0]:.4g} to {sigmas[-1]:.4g}, lowest {sigmas.min():.4g}; use GM Sigmas or GM Policy Sigmas, or "
                "Basic Scheduler with fewer steps"
            )
        extra_args = extra_args or {}
        mixtures = MixtureModel(model, x.shape, extra_args)
        if solver not in MEAN_SOLVERS:
            mixtures.enter_modes(solver)
        time_shift = shift or mixtures.own_shift
        if mixtures.adapter is not None:
            check_steps(mixtures.adapter, sigmas, time_shift)
        if solver == "gm-policy":
            steps = len(sigmas) - 1
            temperature, substeps = settings.get("temperature"), settings.get("substeps") or SUBSTEPS[solver]
            temperature = usual_temperature(steps) if temperature is None else temperature
            about = f"{steps} steps, shift {time_shift:.3g}, temperature {temperature:.3g}, {substeps} substeps"
            notice(about, logging.DEBUG)

        def report(step: int, x: Tensor, x0: Tensor) -> None:
            if callback is not None:
                state = {"x": mixtures.from_solver(x, sigmas[step]), "denoised": mixtures.from_solver(x0, 0.0)}
                callback({"i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], **state})

        def denoise(x: Tensor, sigma: Tensor) -> Policy:
            policy = mixtures.denoise(x, sigma)
            if isinstance(policy, DXPolicy) and solver in ("gm-ode", "gm-sde"):
                raise ValueError(
                    f"{solver} needs a Gaussian mixture, and the adapter {mixtures.adapter.name} has a DX policy; use "
                    "gm-policy (GM Policy Sampler), or a GM adapter"
                )
            return policy

        # not the seed itself: ComfyUI drew the initial noise with it
        seed = ((extra_args.get("seed") or 0) + 1) % 2**64
        one_for_all = isinstance(mixtures.shape, PointShape)
        noise = torch.Generator().manual_seed(seed) if one_for_all else image_generators(seed, model.noise)
        spectrum = None if mixtures.has_source else mixtures.spectrum
        given = {"shift": time_shift, "spectrum": spectrum, "noise": noise, **settings}
        hooks = {
            "callback": report,
            "constrain": mixtures.constrain if mixtures.masked else None,
            "check": comfy.model_management.throw_exception_if_processing_interrupted,
        }
        result = solve(solver, denoise, mixtures.to_solver(x, sigmas[0]), sigmas, **given, **hooks)
        return mixtures.from_solver(result, sigmas[-1])

    return comfy.samplers.KSAMPLER(run)


def check_steps(adapter: Adapter, sigmas: Tensor, shift: float) -> None:
    """Say so if a step is longer, in unshifted time, than those that the adapter was made for."""
    times = unshift_time(sigmas.double().cpu(), shift)
    longest, usual = float(-times.diff().min()), 1 / (adapter.steps - 1 + FINAL_STEP_SIZE)
    if longest > 1.01 * usual:
        notice(
            f"the adapter {adapter.name} was made for {adapter.steps} steps or more, each at most {usual:.3f} of the way, and "
            f"the longest of these {len(sigmas) - 1} goes {longest:.3f}: expect artefacts. Take GM Policy Sigmas with more "
            "steps (or, with denoise below 1, the same share of them)"
        )


def image_generators(seed: int, noise: Tensor) -> list[torch.Generator]:
    """One generator for each image of a batch. It is made from the seed and the image's own initial noise, (B, ...), which
    ComfyUI draws by the image's index: so it does not depend on what else is in the batch."""
    keys = [zlib.crc32(image.float().cpu().numpy().tobytes()) for image in noise]
    if not noise.any():  # switched off
        keys = list(range(len(noise)))
    return generators(seed, keys)


def generators(seed: int, keys: Iterable[int]) -> list[torch.Generator]:
    """One generator for each key of 32 bits. A CPU generator reads no more than 32 bits of its seed."""
    return [torch.Generator().manual_seed(zlib.crc32(seed.to_bytes(8, "little"), key)) for key in keys]


def gm_sigmas(steps: int, shift: float = 1.0, denoise: float = 1.0, final_step_size: float = 1.0) -> Tensor:
    """`steps` + 1 sigmas from `denoise` (before the shift) down to 0; none at all if `denoise` is 0."""
    if denoise <= 0:
        return torch.FloatTensor([])
    return flow_sigmas(steps, shift, start=denoise, final_step_size=final_step_size)


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
                io.Int.Input("substeps", default=128, min=1, max=4096, tooltip=TIPS["policy_substeps"]),
                io.Float.Input("temperature", default=0.0, min=0.0, max=1.0, step=0.01, tooltip=TIPS["temperature"]),
                io.Float.Input("stochasticity", default=0.0, min=0.0, max=10.0, step=0.01, tooltip=TIPS["stochasticity"]),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced or SamplerCustom.")],
        )

    @classmethod
    def execute(cls, substeps: int, temperature: float, stochasticity: float) -> io.NodeOutput:
        settings = {"substeps": substeps, "temperature": temperature or None, "stochasticity": stochasticity}
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
                io.Model.Input("model", tooltip="The model that is sampled: its time shift counts."),
                io.Int.Input("steps", default=4, min=1, max=1000, tooltip=TIPS["steps"]),
                io.Float.Input("shift", default=0.0, min=0.0, max=100.0, step=0.01, tooltip=TIPS["shift"]),
                io.Float.Input(
                    "final_step_size", default=FINAL_STEP_SIZE, min=0.01, max=1.0, step=0.01, tooltip=TIPS["final_step_size"]
                ),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=TIPS["denoise"]),
            ],
            outputs=[io.Sigmas.Output(tooltip="For SamplerCustomAdvanced or SamplerCustom.")],
        )

    @classmethod
    def execute(cls, model, steps: int, shift: float, final_step_size: float, denoise: float) -> io.NodeOutput:
        return io.NodeOutput(
            gm_sigmas(steps, shift or own_shift(model.get_model_object("model_sampling")), denoise, final_step_size)
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
                io.Float.Input("shift", default=1.0, min=0.01, max=100.0, step=0.01, tooltip=TIPS["shift"]),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=TIPS["denoise"]),
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
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=TIPS["seed"]
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
                io.Float.Input("shift", default=0.0, min=0.0, max=100.0, step=0.01, tooltip=TIPS["shift"]),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=TIPS["denoise"]),
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
                    tooltip=GUIDANCE_TIPS["scale"] + " GM Probabilistic Guidance in front of this node sets the rest.",
                ),
                io.Float.Input(
                    "final_step_size",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip=TIPS["final_step_size"] + " 0 takes the solver's own: 0.5 for gm-policy, 1 for the others.",
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
        samples = gm_guider(model, NOTHING if positive is None else positive, negative, guidance).sample(
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
        return io.NodeOutput({**result, "samples": samples.to(comfy.model_management.intermediate_device())})


def fitting_latent(model, latent: dict) -> Tensor:
    """The samples of a LATENT in the model's channels, dimensions and, if they are empty, size of a latent pixel."""
    ratios = {key: latent[key] for key in RATIOS if key in latent}  # newer versions of ComfyUI have them, and a use for them
    known = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
    return comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], **{key: value for key, value in ratios.items() if key in known}
    )
