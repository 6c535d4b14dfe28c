"""Image models: guided denoisers, and samples whose noise depends on their own seed only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..flow.path import flow_sigmas
from ..gaussians.draws import standard_normal
from ..source.source import GaussianMixtureSource
from .denoisers import autoguided, class_denoiser
from .guidance import Guidance
from .solvers import MEAN_SOLVERS, Callback, solve


@torch.inference_mode()
def sample_images(
    network: nn.Module,
    labels: Tensor | None,
    *,
    solver: str = "gm-ode",
    steps: int = 8,
    order: int = 2,
    substeps: int | None = None,
    shift: float = 1.0,
    guidance: Guidance | None = None,
    seeds: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    sigmas: Tensor | None = None,
    source: GaussianMixtureSource | None = None,
    modes: Tensor | None = None,
    guide: nn.Module | None = None,
    guide_scale: float = 1.5,
    callback: Callback | None = None,
) -> Tensor:
    """Samples (B, C, h, w) of an image model in its own space (latents, or pixels in [-1, 1]), on its device.

    Args:
        network: a `GMDiT` or `DiTDH`; its spectrum network, if it has one, serves "gm-sde".
        labels: (B,) integers; `num_classes` for no class. None: the labels are the modes of the source.
        solver, order, substeps, callback: see `gmflow_core.solvers.solve`.
        steps, shift: see `flow_sigmas`; one network call a step. 0 steps give the noise itself.
        seeds: one for each image; all of its noise comes from it alone. 0 to B - 1 if None.
        size: (h, w) of the latents; the model's own if None.
        sigmas: the times, instead of those of `steps` and `shift`.
        source: where the noise comes from, if the model was trained with it.
        modes: (B,) of the source, one for each image; drawn by their weights if None.
        guide, guide_scale: a weaker network for `autoguided`, which shares labels and modes.

    Raises:
        ValueError: a setting is out of range, or the solver needs modes that the network knows and that are spherical.
    """
    config, device = network.config, next(network.parameters()).device
    given = next((each for each in (labels, modes, seeds) if each is not None), None)
    if given is None or (labels is None and source is None):
        raise ValueError(
            "give labels; or a source whose modes are the labels, and the modes or seeds"
        )
    seeds = range(len(given)) if seeds is None else seeds
    if any(len(each) != len(seeds) for each in (labels, modes) if each is not None):
        raise ValueError(
            f"{len(seeds)} seeds do not fit {len(given)} labels or modes; give one for each image"
        )
    shape = (len(seeds), config.channels, *(size or (config.latent_size, config.latent_size)))
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    noise = standard_normal(shape, generators, like=torch.empty(0, device=device))
    frame, x = None, noise
    if modes is not None:
        modes = torch.as_tensor(modes)
        if source is None:
            raise ValueError("modes are those of a source; give the source, too")
    if labels is None and config.num_classes != source.num_modes:
        raise ValueError(
            f"a network of {config.num_classes} labels does not know the {source.num_modes} modes of this source; give labels "
            "(zeros for an unconditional network) to sample one whose modes are hidden"
        )
    if labels is None and guidance is not None and not guidance.idle:
        raise ValueError(
            "a network whose labels are modes knows of none, which guidance needs; take autoguidance"
        )
    if source is not None:
        source.require_shape(shape[1:])
        modes = source.draw_modes(len(seeds), generators) if modes is None else modes
        source = source.to(device)
        if labels is None and source.is_spherical:
            frame = source.frame(modes)
        elif solver not in MEAN_SOLVERS:
            why = (
                "the network does not know the modes"
                if labels is not None
                else "its modes are diagonal"
            )
            raise ValueError(
                f"{solver} has no closed form for this mixture source, as {why}; take one of {', '.join(MEAN_SOLVERS)}"
            )
        else:
            x = source.draw(modes, noise=noise)
        labels = modes if labels is None else labels
    if steps == 0 and sigmas is None:
        return x if frame is None else frame.leave(x, 1.0)
    labels = labels.to(device)
    denoisers = [
        class_denoiser(each, labels, guidance)
        for each in ([network] if guide is None else [network, guide])
    ]
    sigmas = flow_sigmas(steps, shift) if sigmas is None else sigmas
    report = callback
    if frame is not None:
        denoisers, times = [frame.denoiser(each) for each in denoisers], sigmas.tolist()

        def report(step: int, x: Tensor, x0: Tensor) -> None:
            if callback is not None:
                callback(step, frame.leave(x, times[step]), x0 * frame.std)

    denoiser = denoisers[0] if guide is None else autoguided(*denoisers, guide_scale)
    spectrum = network.spectrum_net if source is None else None
    settings = {
        "order": order,
        "substeps": substeps,
        "shift": shift,
        "spectrum": spectrum,
        "noise": generators,
    }
    x = solve(solver, denoiser, x, sigmas, **settings, callback=report)
    return x if frame is None else frame.leave(x, times[-1])
