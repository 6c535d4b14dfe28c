"""Denoisers: callables (x, sigma) -> mixture of x_0, from networks with labels and guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..flow.path import velocity_to_x0
from ..gaussians.mixture import GaussianMixture
from .guidance import Guidance, classifier_free_guidance


def class_denoiser(
    network: nn.Module, labels: Tensor, guidance: Guidance | None = None
) -> Denoiser:
    """The denoiser of a class-conditional network, with cond and uncond in one batch where guidance acts.

    Args:
        network: a `GMDiT` or `DiTDH`, called as network(x, sigma, labels).
        labels: (B,) integers.

    Raises:
        ValueError: a label is out of range.
    """
    config = network.config
    null = config.num_classes  # the label for none, where there is one
    largest = null if getattr(config, "null_class", True) else null - 1
    if null and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= largest:
        raise ValueError(
            f"labels between {int(labels.min())} and {int(labels.max())} do not fit a model of {null} classes"
        )
    if guidance is not None and not guidance.idle and largest != null:
        raise ValueError(
            "guidance needs a model that knows of no label, and this one always has one; take autoguidance instead"
        )

    both = torch.cat([labels, torch.full_like(labels, null)])

    def denoise(x: Tensor, sigma: Tensor) -> GaussianMixture:
        if guidance is None or not guidance.acts_at(sigma):
            return velocity_to_x0(network(x, sigma, labels.to(x.device)), x, sigma)
        cond, uncond = network(
            torch.cat([x, x]), torch.cat([sigma, sigma]), both.to(x.device)
        ).chunk(2)
        return guidance.of_velocities(cond, uncond, x, sigma)

    return denoise


def autoguided(denoiser: Denoiser, guide: Denoiser, scale: float) -> Denoiser:
    """Autoguidance (Karras et al. 2024): away from a weaker model of the same thing, as `classifier_free_guidance` is away from
    the unconditional one; `scale` 1 leaves the denoiser as it is."""
    return lambda x, sigma: classifier_free_guidance(
        denoiser(x, sigma), guide(x, sigma).mean(), scale
    )


Denoiser = Callable[[Tensor, Tensor], GaussianMixture]
