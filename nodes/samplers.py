"""GM samplers: as SAMPLER and SIGMAS for SamplerCustomAdvanced, and one all-in-one node."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io
from torch import Tensor

from ..gmflow_core import flow_sigmas
from ..gmflow_core.solvers import SOLVERS, solve
from .guidance import TIPS as GUIDANCE_TIPS
from .guidance import gm_guider, guided
from .seam import MixtureModel, has_probabilistic_guidance

NOTHING = [[torch.zeros(1, 1, 1), {}]]  # CONDITIONING for models that take none; others ask for labels

TIPS = {
    "order": "2 corrects every mixture with the one before it; 1 takes them as they are.",
    "substeps": "GM-ODE's small steps between two network calls. They cost little beside the network: 8 are plenty for 4 "
    "or more network calls; take 16 for 2, and 32 for 1.",
    "steps": "Network calls. GM samplers are made for 4 to 8.",
    "shift": "Time shift: above 1 spends more of the steps at high noise. 1 is what the models here are trained for.",
    "denoise": "1 starts from pure noise; less starts from the latent with that share of noise added (image to image).",
    "seed": "Seed of the initial noise, and of the noise that GM-SDE adds.",
}


def gm_sampler(solver: str, order: int = 2, substeps: int = 8, batch_index: list[int] | None = None) -> comfy.samplers.KSAMPLER:
    """A SAMPLER that runs a solver of gmflow_core.

    Args:
        solver: one of SOLVERS.
        batch_index: of a LATENT: where in its batch each image was; in order if None.
    """

    def run(model, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, callback=None, disable=None) -> Tensor:
        if len(sigmas) < 2:
            return x
        if not sigmas.max() <= 1 or (sigmas.diff() >= 0).any():
            raise ValueError(
                f"GM samplers need sigmas that fall from at most 1 to 0, and these go from {sigmas[0]:.4g} to "
                f"{sigmas[-1]:.4g} in {len(sigmas) - 1} steps; use GM Sigmas, or Basic Scheduler with fewer steps"
            )
        extra_args = extra_args or {}
        mixtures = MixtureModel(model, x.shape, extra_args)

        def report(step: int, x: Tensor, x0: Tensor) -> None:
            if callback is not None:
                state = {"x": mixtures.from_solver(x), "denoised": mixtures.from_solver(x0)}
                callback({"i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], **state})

        # not the seed itself: ComfyUI drew the initial noise with it
        noise = torch.Generator().manual_seed(((extra_args.get("seed") or 0) + 1) % 2**64)
        if not mixtures.of_points:
            noise = image_generators(noise, batch_index or range(len(x)))
        settings = {"order": order, "substeps": substeps, "spectrum": mixtures.spectrum, "noise": noise}
        hooks = {"callback": report, "constrain": mixtures.constrain}
        x = solve(solver, mixtures.denoise, mixtures.to_solver(x), sigmas, **settings, **hooks)
        return mixtures.from_solver(x)

    return comfy.samplers.KSAMPLER(run)


def image_generators(source: torch.Generator, batch_index: Sequence[int]) -> list[torch.Generator]:
    """One generator for each image, so that its noise does not depend on what else is in its batch."""
    seeds = [torch.randint(2**62, (), generator=source).item() for _ in range(max(batch_index) + 1)]
    return [torch.Generator().manual_seed(seeds[index]) for index in batch_index]


def gm_sigmas(steps: int, shift: float = 1.0, denoise: float = 1.0) -> Tensor:
    """`steps` + 1 sigmas from `denoise` (before the shift) down to 0; none at all if `denoise` is 0."""
    if denoise <= 0:
        return torch.FloatTensor([])
    return flow_sigmas(max(steps, round(steps / denoise)), shift)[-steps - 1 :]


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
        return io.NodeOutput(gm_sampler("gm-ode", order, substeps))


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
        return io.NodeOutput(gm_sampler("gm-sde", order))


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
                io.Model.Input("model", tooltip="A model from Load GM Model."),
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
                    tooltip="gm-ode is deterministic, gm-sde stochastic; euler and dpmpp-2m (DPM-Solver++ of second order) "
                    "follow the mean only, as stock samplers do, for comparison (they ignore order and substeps).",
                ),
                io.Int.Input("order", default=2, min=1, max=2, tooltip=TIPS["order"]),
                io.Int.Input("substeps", default=8, min=1, max=1024, tooltip=TIPS["substeps"]),
                io.Float.Input("shift", default=1.0, min=0.01, max=100.0, step=0.01, tooltip=TIPS["shift"]),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=TIPS["denoise"]),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="What to generate, from GM Class Labels; leave it open for models that take no conditioning.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What guidance steers away from; no class if nothing is connected."
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
    ) -> io.NodeOutput:
        sigmas = gm_sigmas(steps, shift, denoise)
        if not len(sigmas):
            return io.NodeOutput(latent_image)
        samples = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        batch_index = latent_image.get("batch_index")
        noise = comfy.sample.prepare_noise(samples, seed, batch_index)
        if guidance and not has_probabilistic_guidance(model):
            model = guided(model)
        samples = gm_guider(model, NOTHING if positive is None else positive, negative, guidance).sample(
            noise,
            samples,
            gm_sampler(solver, order, substeps, batch_index),
            sigmas,
            denoise_mask=latent_image.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        return io.NodeOutput({**latent_image, "samples": samples.to(comfy.model_management.intermediate_device())})
