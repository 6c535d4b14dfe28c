"""Class-conditional image models: guided denoisers, and samples whose noise depends on their own seed only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .guidance import Guidance
from .mixture import GaussianMixture, standard_normal
from .path import flow_sigmas, velocity_to_x0
from .solvers import Callback, Denoiser, solve


def class_denoiser(network: nn.Module, labels: Tensor, guidance: Guidance | None = None) -> Denoiser:
    """The denoiser of a class-conditional network, with cond and uncond in one batch where guidance acts.

    Args:
        network: a `GMDiT`, called as network(x, sigma, labels).
        labels: (B,) integers.

    Raises:
        ValueError: a label is out of range.
    """
    null = network.config.num_classes
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= null:
        raise ValueError(f"labels between {int(labels.min())} and {int(labels.max())} do not fit a model of {null} classes")

    def denoise(x: Tensor, sigma: Tensor) -> GaussianMixture:
        if guidance is None or not guidance.acts_at(sigma):
            return velocity_to_x0(network(x, sigma, labels.to(x.device)), x, sigma)
        both = torch.cat([labels, torch.full_like(labels, null)]).to(x.device)
        cond, uncond = network(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return guidance(velocity_to_x0(cond, x, sigma), velocity_to_x0(uncond.mean(), x, sigma))

    return denoise


@torch.inference_mode()
def sample_images(
    network: nn.Module,
    labels: Tensor,
    *,
    solver: str = "gm-ode",
    steps: int = 8,
    order: int = 2,
    substeps: int | None = None,
    shift: float = 1.0,
    guidance: Guidance | None = None,
    seeds: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Samples (B, C, h, w) of a class-conditional model in its own space (latents, or pixels in [-1, 1]), on its device.

    Args:
        network: a `GMDiT`; its spectrum network, if it has one, serves "gm-sde".
        labels: (B,) integers; `num_classes` for no class.
        solver, order, substeps, callback: see `gmflow_core.solvers.solve`.
        steps, shift: see `flow_sigmas`; one network call a step.
        seeds: one for each image; all of its noise comes from it alone. 0 to B - 1 if None.
        size: (h, w) of the latents; the model's own if None.

    Raises:
        ValueError: a setting is out of range.
    """
    config, device = network.config, next(network.parameters()).device
    seeds = range(len(labels)) if seeds is None else seeds
    if len(seeds) != len(labels):
        raise ValueError(f"{len(seeds)} seeds do not fit {len(labels)} labels; give one for each image")
    shape = (len(labels), config.channels, *(size or (config.latent_size, config.latent_size)))
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    x = standard_normal(shape, generators, like=torch.empty(0, device=device))
    denoiser = class_denoiser(network, labels.to(device), guidance)
    settings = {"order": order, "substeps": substeps, "shift": shift, "spectrum": network.spectrum_net, "noise": generators}
    return solve(solver, denoiser, x, flow_sigmas(steps, shift), **settings, callback=callback)
