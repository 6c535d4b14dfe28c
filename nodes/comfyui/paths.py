"""The path from data to noise that a MODEL's latents follow, told by what its sampling does."""

from __future__ import annotations

import torch
from torch import Tensor

from ...gmflow_core.flow.scaled_paths import STRAIGHT, ScaledPath

HIGHEST = 1 + 1e-4  # sigma of a flow: 1, and what rounding adds for some time shifts


def path_of(model_sampling) -> ScaledPath:
    """Return the path of a model's sampling.

    It is the straight one for flow models (with the noise at a scale of its own, for some), and
    the exploding one, x_0 + sigma eps, for models of epsilon, of v and of EDM, whatever they
    predict: ComfyUI hands the prediction of x_0 to samplers.

    Raises:
        ValueError: the sampling follows neither; the message names its classes.
    """
    sigma, one = torch.tensor([0.25, 0.5]), torch.ones(2, 1, 1, 1)
    each, nothing = sigma.reshape(2, 1, 1, 1), 0 * one
    signal = model_sampling.noise_scaling(sigma, nothing.clone(), one.clone())
    noise = model_sampling.noise_scaling(sigma, one.clone(), nothing.clone())
    if _is(signal, one) and _is(noise, each):
        raw = _is(model_sampling.calculate_input(sigma, one), one)  # for a network of other latents
        if not raw:
            return ScaledPath(exploding=True)
    elif _is(signal, 1 - each) and _highest(model_sampling) <= HIGHEST:
        scale = float(noise.flatten()[0] / sigma[0])
        denoised = model_sampling.calculate_denoised(sigma, one, one)
        if scale > 0 and _is(noise, scale * each) and _is(denoised, 1 - each):
            return STRAIGHT if scale == 1 else ScaledPath(noise_scale=scale)
    raise ValueError(
        f"wrong sampling: {names_of(model_sampling)} is neither that of a flow nor one of noise "
        "added to the picture (epsilon, v-prediction, EDM), which GM samplers and guidance need; "
        "use a stock sampler, or remove the node that set it"
    )


def names_of(model_sampling) -> str:
    """Return the classes of a sampling and its highest sigma, for a message."""
    kind = type(model_sampling)
    kinds = ", ".join(each.__name__ for each in (kind, *kind.__bases__))
    return f"{kinds} (sigmas up to {_highest(model_sampling):.4g})"


def _highest(model_sampling) -> float:
    return float(model_sampling.sigma_max)


def _is(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found.float(), expected)
