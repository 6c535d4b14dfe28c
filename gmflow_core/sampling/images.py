"""Sample image models, with noise that depends on each image's own seed only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..flow.checks import listed, whole_number
from ..flow.following import Constrain
from ..flow.path import flow_sigmas
from ..gaussians.draws import standard_normal
from ..source.mode_frame import ModeFrame
from ..source.source import GaussianMixtureSource
from .denoisers import autoguided, class_denoiser
from .guidance import Guidance
from .hooks import Blend, Callback
from .seeds import seed_list
from .solvers import MEAN_SOLVERS, solve
from .trajectory import Trajectory

LARGEST_SIDE = 2**16  # of latents


@torch.inference_mode()
def sample_images(
    network: nn.Module,
    labels: Tensor | None,
    *,
    solver: str = "gm-ode",
    steps: int = 8,
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
    **settings: Any,
) -> Tensor | tuple[Tensor, Trajectory]:
    """Sample an image model in its own space: latents, or pixels in [-1, 1].

    Args:
        network: a `GMDiT` or `DiTDH`; its spectrum network, if it has one, serves "gm-sde".
        labels: (B,) integers; `num_classes` for no class. None: the source's modes are the labels.
        solver: a name in `SOLVERS`.
        steps, shift: see `flow_sigmas`; one network call per step. 0 steps return the noise itself.
        seeds: one per image, see `seed_list`; all its noise comes from it alone. 0 to B - 1 if
            None.
        size: (h, w) of the latents; the model's own if None.
        sigmas: times to use instead of those of `steps` and `shift`.
        source: source of the noise, if the model was trained with one.
        modes: (B,) modes of the source, one per image; drawn by their weights if None.
        guide, guide_scale: weaker network for `autoguided`; it shares labels and modes.
        callback: see `Hooks`.
        settings: further settings for `solve`, such as `order`, `substeps` and `return_trajectory`.

    Returns:
        (B, C, h, w), on the network's device; with a trajectory, if one is asked for.

    Raises:
        ValueError: a setting is out of range, or the solver needs modes that the network knows
            and that are spherical.
    """
    config, device = network.config, next(network.parameters()).device
    seeds = None if seeds is None else seed_list(seeds)
    steps = whole_number("steps", steps, least=0)
    count = _count_images(labels, modes, seeds, source)
    shape = (count, config.channels, *_size(size, config.latent_size))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(count)]
    noise = standard_normal(shape, generators, like=torch.empty(0, device=device))
    frame, x = None, noise
    if labels is None:
        _check_modes_are_labels(config.num_classes, source, guidance)
    if source is not None:
        source.require_shape(shape[1:])
        modes = source.draw_modes(count, generators) if modes is None else torch.as_tensor(modes)
        frame, x = _source_start(source.to(device), modes, noise, labels is None, solver)
        labels = modes if labels is None else labels
    if steps == 0 and sigmas is None:
        return x if frame is None else frame.leave(x, 1.0)
    sigmas = flow_sigmas(steps, shift) if sigmas is None else sigmas
    networks = [network] if guide is None else [network, guide]
    denoisers = [class_denoiser(each, labels.to(device), guidance) for each in networks]
    settings = {"shift": shift, "noise": generators, "callback": callback, **settings}
    settings.setdefault("spectrum", network.spectrum_net if source is None else None)
    if frame is not None:
        denoisers = [frame.denoiser(each) for each in denoisers]
        settings |= _hooks_in_frame(frame, sigmas, settings)
    denoiser = denoisers[0] if guide is None else autoguided(*denoisers, guide_scale)
    result = solve(solver, denoiser, x, sigmas, **settings)
    return result if frame is None else _leave(frame, result, float(sigmas[-1]))


def _size(size: tuple[int, int] | None, own: int) -> list[int]:
    """Return h and w of the latents; the network checks whether they fit it."""
    size = (own, own) if size is None else listed(size)
    if len(size) != 2:
        raise ValueError(f"size has {len(size)} numbers; give two, (h, w) of the latents")
    return [whole_number("a side of size", each, most=LARGEST_SIDE) for each in size]


def _count_images(
    labels: Tensor | None,
    modes: Tensor | None,
    seeds: Sequence[int] | None,
    source: GaussianMixtureSource | None,
) -> int:
    """Return B, and check that labels, modes and seeds agree."""
    given = [len(each) for each in (labels, modes, seeds) if each is not None]
    if not given or (labels is None and source is None):
        raise ValueError(
            "give labels; or a source whose modes are the labels, and the modes or seeds"
        )
    count = given[0] if seeds is None else len(seeds)
    if any(each != count for each in given):
        raise ValueError(
            f"{count} seeds do not fit {given[0]} labels or modes; give one for each image"
        )
    if modes is not None and source is None:
        raise ValueError("modes belong to a source; give the source, too")
    return count


def _check_modes_are_labels(
    num_classes: int, source: GaussianMixtureSource, guidance: Guidance | None
) -> None:
    """Check that a network can take the source's modes for labels."""
    if num_classes != source.num_modes:
        raise ValueError(
            f"a network of {num_classes} labels does not know the {source.num_modes} modes of this "
            "source; give labels (zeros for an unconditional network) to sample one whose modes "
            "are hidden"
        )
    if guidance is not None and not guidance.idle:
        raise ValueError(
            "a network whose labels are modes has no label for no class, which guidance needs; "
            "use autoguidance"
        )


def _source_start(
    source: GaussianMixtureSource, modes: Tensor, noise: Tensor, known: bool, solver: str
) -> tuple[ModeFrame | None, Tensor]:
    """Return the frame in which the solver works, if any, and its initial x.

    Args:
        known: the network knows the modes.
    """
    if known and source.is_spherical:
        return source.frame(modes), noise
    if solver not in MEAN_SOLVERS:
        why = "its modes are diagonal" if known else "the network does not know the modes"
        raise ValueError(
            f"{solver} has no closed form for this mixture source, as {why}; use one of "
            f"{', '.join(MEAN_SOLVERS)}"
        )
    return None, source.draw(modes, noise=noise)


def _hooks_in_frame(frame: ModeFrame, sigmas: Tensor, given: dict[str, Any]) -> dict[str, Callable]:
    """Return the hooks that are given, for a solver in the frame's coordinates."""
    callback: Callback | None = given.get("callback")
    constrain: Constrain | None = given.get("constrain")
    blend: Blend | None = given.get("blend")
    times, hooks = sigmas.tolist(), {}
    if callback is not None:
        hooks["callback"] = lambda step, y, y0: callback(
            step, frame.leave(y, times[step]), y0 * frame.std
        )
    if constrain is not None:
        hooks["constrain"] = lambda y, sigma: frame.enter(
            constrain(frame.leave(y, sigma), sigma), sigma
        )
    if blend is not None:
        hooks["blend"] = lambda start, sigma, y, end: frame.enter(
            blend(frame.leave(start, sigma), sigma, frame.leave(y, end), end), end
        )
    return hooks


def _leave(
    frame: ModeFrame, result: Tensor | tuple[Tensor, Trajectory], sigma: float
) -> Tensor | tuple[Tensor, Trajectory]:
    """Convert a solver's result at sigma from the frame's coordinates to the images' own."""
    if isinstance(result, Tensor):
        return frame.leave(result, sigma)
    x, trajectory = result
    pairs = zip(trajectory.x, trajectory.sigmas.tolist(), strict=True)
    states = torch.stack([frame.leave(*pair) for pair in pairs])
    moved = Trajectory(trajectory.sigmas, states, trajectory.x0 * frame.std)
    return frame.leave(x, sigma), moved
