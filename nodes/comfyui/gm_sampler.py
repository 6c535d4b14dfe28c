"""Run the solvers of gmflow_core as a ComfyUI SAMPLER."""

from __future__ import annotations

import inspect
import logging
import zlib
from collections.abc import Iterable

import comfy.utils
import torch
from torch import Tensor

from ...gmflow_core import DXPolicy, flow_sigmas, unshift_time
from ...gmflow_core.flow.policy import Policy
from ...gmflow_core.sampling.solvers import (
    FINAL_STEP_SIZE,
    MEAN_SOLVERS,
    SUBSTEPS,
    solve,
    usual_temperature,
)
from .latent_shapes import PointShape
from .notices import notice
from .options import Adapter
from .solver_model import MixtureModel

RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # keys of a LATENT
OWN = 0  # of a setting: the model's, or the solver's, own value


def gm_sampler(solver: str, shift: float = OWN, **settings) -> comfy.samplers.KSAMPLER:
    """A SAMPLER that runs a solver of gmflow_core.

    Args:
        solver: one of SOLVERS.
        shift: time shift of the sigmas; the model's own if 0.
        settings: for `solve`.
    """

    def run(
        model,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict | None = None,
        callback=None,
        disable=None,
    ) -> Tensor:
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
            temperature, substeps = (
                settings.get("temperature"),
                settings.get("substeps") or SUBSTEPS[solver],
            )
            temperature = usual_temperature(steps) if temperature is None else temperature
            about = f"{steps} steps, shift {time_shift:.3g}, temperature {temperature:.3g}, {substeps} substeps"
            notice(about, logging.DEBUG)

        def report(step: int, x: Tensor, x0: Tensor) -> None:
            if callback is not None:
                state = {
                    "x": mixtures.from_solver(x, sigmas[step]),
                    "denoised": mixtures.from_solver(x0, 0.0),
                }
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
        noise = (
            torch.Generator().manual_seed(seed)
            if one_for_all
            else image_generators(seed, model.noise)
        )
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
    return [
        torch.Generator().manual_seed(zlib.crc32(seed.to_bytes(8, "little"), key)) for key in keys
    ]


def gm_sigmas(
    steps: int, shift: float = 1.0, denoise: float = 1.0, final_step_size: float = 1.0
) -> Tensor:
    """`steps` + 1 sigmas from `denoise` (before the shift) down to 0; none at all if `denoise` is 0."""
    if denoise <= 0:
        return torch.FloatTensor([])
    return flow_sigmas(steps, shift, start=denoise, final_step_size=final_step_size)


def fitting_latent(model, latent: dict) -> Tensor:
    """The samples of a LATENT in the model's channels, dimensions and, if they are empty, size of a latent pixel."""
    ratios = {
        key: latent[key] for key in RATIOS if key in latent
    }  # newer versions of ComfyUI have them, and a use for them
    known = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
    return comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], **{key: value for key, value in ratios.items() if key in known}
    )
