"""Denoisers: callables (x, sigma) -> mixture of x_0, made from networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..fast.choice import form_of
from ..flow.path import velocity_to_x0
from ..gaussians.mixture import Mixture
from .guidance import Guidance, classifier_free_guidance

Denoiser = Callable[[Tensor, Tensor], Mixture]


def denoiser_of(network: Callable[[Tensor, Tensor], Mixture]) -> Denoiser:
    """Return the denoiser of a network that predicts mixtures of velocities."""
    return lambda x, sigma: velocity_to_x0(network(x, sigma), x, sigma)


def class_denoiser(
    network: nn.Module, labels: Tensor, guidance: Guidance | None = None
) -> Denoiser:
    """Return the denoiser of a class-conditional network.

    Where guidance acts, the conditional and the unconditional call share one batch.

    Args:
        network: a `GMDiT` or `DiTDH`, called as network(x, sigma, labels).
        labels: (B,) integers.
        guidance: None for none.

    Raises:
        ValueError: a label is out of range, or the network cannot be guided.
    """
    config = network.config
    null = config.num_classes  # label for "no class", where the network has one
    largest = null if getattr(config, "null_class", True) else null - 1
    if null and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= largest:
        raise ValueError(
            f"labels between {int(labels.min())} and {int(labels.max())} do not fit a model of "
            f"{null} classes"
        )
    if guidance is not None and not guidance.idle and largest != null:
        raise ValueError(
            "guidance needs a model with a label for no class, and this one has none; "
            "use autoguidance instead"
        )
    guide = None if guidance is None else form_of(guidance.of_velocities)
    both = torch.cat([labels, torch.full_like(labels, null)])

    def denoise(x: Tensor, sigma: Tensor) -> Mixture:
        if guidance is None or not guidance.acts_at(sigma):
            return velocity_to_x0(network(x, sigma, labels.to(x.device)), x, sigma)
        batch = torch.cat([x, x]), torch.cat([sigma, sigma]), both.to(x.device)
        cond, uncond = network(*batch).chunk(2)
        return guide(cond, uncond, x, sigma)

    return denoise


def autoguided(denoiser: Denoiser, guide: Denoiser, scale: float) -> Denoiser:
    """Return a denoiser with autoguidance (Karras et al. 2024).

    It steers away from a weaker model, as `classifier_free_guidance` steers away from the
    unconditional one.

    Args:
        guide: denoiser of the weaker model.
        scale: 1 leaves the denoiser as it is.
    """
    return lambda x, sigma: classifier_free_guidance(
        denoiser(x, sigma), guide(x, sigma).mean(), scale
    )
