"""Run the solvers of gmflow_core as a ComfyUI SAMPLER, and make the SIGMAS for them."""

from __future__ import annotations

import math

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ...gmflow_core import flow_sigmas
from ...gmflow_core.flow.blended import Followed, is_mixture, kind_of
from ...gmflow_core.flow.scaled_paths import ScaledPath
from ...gmflow_core.gaussians.draws import Generator
from ...gmflow_core.sampling.solvers import SOLVERS, solve
from .adapter_checks import check_steps, report_guidance
from .adapter_info import with_own_temperature
from .finite import check_inputs, report_result
from .generators import image_generators
from .guard import guarded
from .guiders import guidance_of
from .latent_shapes import PointShape
from .notices import notice
from .paths import HIGHEST
from .plain_model import note_use, spread_in_words
from .solver_choice import no_effect, report_settings
from .solver_model import SolverModel

OWN = 0  # value of a setting that stands for the model's, or the solver's, own value


def gm_sampler(
    solver: str, shift: float = OWN, *, quiet: bool = False, **settings
) -> comfy.samplers.KSAMPLER:
    """Return a SAMPLER that runs a solver of gmflow_core.

    Args:
        solver: one of SOLVERS.
        shift: time shift of the sigmas; the model's own if 0.
        quiet: True does not show the settings on the node.
        settings: further arguments of `solve`.
    """

    def run(
        model,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict | None = None,
        callback=None,
        disable=None,
    ) -> Tensor:
        """Sample from sigmas[0] to sigmas[-1]; the signature is that of k-diffusion's samplers."""
        if len(sigmas) < 2:
            return x
        extra_args = extra_args or {}
        wrapped = SolverModel(model, x.shape, extra_args, sigmas)
        if wrapped.is_plain:  # others are watched, see `sampling_run.watched`
            check_inputs(wrapped.guider, latent_image=x, mask=extra_args.get("denoise_mask"))
        sigmas = wrapped.path.sigma_of(check_sigmas(sigmas, wrapped.path)).clamp(max=1)
        time_shift = shift or wrapped.own_shift
        if SOLVERS[solver].needs_mixture:
            wrapped.enter_modes(solver)
            note_use(extra_args.get("model_options"))
        if wrapped.few_steps is not None:
            check_steps(wrapped.few_steps, sigmas, time_shift)
            report_guidance(wrapped.guider, wrapped.few_steps)
        own = with_own_temperature(wrapped.few_steps, settings)
        if wrapped.is_plain:
            report_start(wrapped, sigmas)
            own = {**own, "temperature": own.get("temperature") or 1.0}  # the spread as it is set
        own = {"spectrum": wrapped.spectrum, **own}
        if own.get("spacing") == "sigma" and time_shift == 1:
            no_effect("spacing", "the time shift is 1: sigma and time are the same")
        if "spectrum" in settings and wrapped.spectrum is None:
            no_effect("spectrum", "no spectrum network applies to this model")
        if not quiet:
            about = [guidance_of(wrapped.guider)]
            if wrapped.is_plain and SOLVERS[solver].needs_mixture:
                about.insert(0, spread_in_words(extra_args.get("model_options")))
            known = ", ".join(filter(None, about))
            highest = wrapped.highest
            report_settings(solver, sigmas, time_shift, own, known, wrapped.few_steps, highest)
        result = solve(
            solver,
            wrapped.denoise if SOLVERS[solver].takes_policies else mixtures_only(wrapped, solver),
            wrapped.to_solver(x, sigmas[0]),
            sigmas,
            shift=time_shift,
            noise=step_noise(wrapped, extra_args.get("seed") or 0, x),
            callback=progress(wrapped, sigmas, callback),
            constrain=wrapped.constrain if wrapped.masked else None,
            blend=wrapped.blend if wrapped.masked else None,
            check=comfy.model_management.throw_exception_if_processing_interrupted,
            **own,
        )
        result = wrapped.from_solver(result, sigmas[-1])
        if wrapped.is_plain:
            report_result(result, wrapped.guider)
        return result

    return comfy.samplers.KSAMPLER(guarded(run))


def check_sigmas(sigmas: Tensor, path: ScaledPath) -> Tensor:
    """Return sigmas, in a model's units, if they fall in every step.

    Raises:
        ValueError: they do not, or leave [0, 1] on any but the exploding path.
    """
    highest = math.inf if path.exploding else HIGHEST
    if not 0 <= sigmas.min() <= sigmas.max() <= highest or not (sigmas.diff() < 0).all():
        falls = (sigmas.diff() < 0).tolist()
        where = "" if all(falls) else f"; step {falls.index(False) + 1} does not fall"
        most = "" if path.exploding else "from at most 1 "
        raise ValueError(
            f"GM samplers need sigmas that fall in every step, {most}to 0, and these "
            f"{len(sigmas) - 1} steps go from {sigmas[0]:.4g} to {sigmas[-1]:.4g}, lowest "
            f"{sigmas.min():.4g}{where}; use GM Sigmas or GM Policy Sigmas, or Basic Scheduler "
            "with fewer steps"
        )
    return sigmas


def report_start(wrapped: SolverModel, sigmas: Tensor) -> None:
    """Show on the node if sigmas of a flow, which start at 1, are those of another path."""
    start, highest = float(wrapped.path.time_of(sigmas[0])), wrapped.sigma_max
    if wrapped.path.exploding and start == 1 and highest > 2:
        notice(
            f"too little noise: these sigmas start at 1 of {highest:.3g}, as those of a flow do; "
            "connect the model to GM Sigmas, or use Basic Scheduler with the scheduler gm"
        )


def mixtures_only(wrapped: SolverModel, solver: str):
    """Return the model's denoiser, for solvers that need a Gaussian mixture.

    Raises, when it is called:
        ValueError: the model has another policy.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Followed:
        policy = wrapped.denoise(x, sigma)
        if not is_mixture(policy):
            raise ValueError(
                f"{solver} needs a Gaussian mixture, and {wrapped.few_steps.name} has "
                f"{kind_of(policy)}; use gm-policy (GM Policy Sampler), or a GM adapter"
            )
        return policy

    return denoise


def step_noise(wrapped: SolverModel, seed: int, x: Tensor) -> Generator:
    """Return the generators for the noise of stochastic steps: one for each image.

    Points share one, as they are too many for one each. ComfyUI has drawn the initial noise with
    the seed itself, so the steps use the next one.
    """
    seed = (seed + 1) % 2**64
    if isinstance(wrapped.shape, PointShape):
        return torch.Generator().manual_seed(seed)
    return image_generators(seed, x if wrapped.noise is None else wrapped.noise)


def progress(wrapped: SolverModel, sigmas: Tensor, callback):
    """Return a solver's callback that hands latents to a k-diffusion callback, if there is one."""
    if callback is None:
        return None

    def report(step: int, x: Tensor, x0: Tensor) -> None:
        callback(
            {
                "i": step,
                "sigma": sigmas[step],
                "sigma_hat": sigmas[step],
                "x": wrapped.from_solver(x, sigmas[step]),
                "denoised": wrapped.from_solver(x0, 0.0),
            }
        )

    return report


def gm_sigmas(
    steps: int, shift: float = 1.0, denoise: float = 1.0, final_step_size: float = 1.0
) -> Tensor:
    """Return `steps` + 1 sigmas from `denoise` (before the shift) down to 0.

    If `denoise` is 0, there are none.
    """
    if denoise <= 0:
        return torch.FloatTensor([])
    return flow_sigmas(steps, shift, start=denoise, final_step_size=final_step_size)
