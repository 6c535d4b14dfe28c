"""Denoisers: callables (x, sigma) -> mixture or other policy of x_0, made from networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..fast.choice import form_of
from ..flow.path import velocity_to_x0
from ..flow.policy import Policy, PolicyVelocity, predict_x0
from ..flow.single_gaussian import Spread, single_gaussian
from .guidance import Guidance, classifier_free_guidance

Denoiser = Callable[[Tensor, Tensor], Policy]


def denoiser_of(
    network: Callable[[Tensor, Tensor], PolicyVelocity | Tensor], spread: Spread | None = None
) -> Denoiser:
    """Return the denoiser of a network that predicts velocities u at (x, sigma).

    Args:
        network: called as network(x, sigma), with x (B, C, *S) and sigma (B,); returns a mixture of
            velocities, another policy's velocities, or the mean velocity (B, C, *S) of an ordinary
            flow model.
        spread: standard deviation of an ordinary flow model's velocity, as in `single_gaussian`;
            None for a network that predicts mixtures.

    Raises:
        ValueError: from the denoiser, if the network predicts a velocity and there is no `spread`,
            or a mixture and there is one.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Policy:
        velocity = network(x, sigma)
        if isinstance(velocity, Tensor) == (spread is None):
            predicted, advice = ("a velocity", "give") if spread is None else ("a mixture", "omit")
            raise ValueError(
                f"the network predicts {predicted} ({type(velocity).__name__}), and spread is "
                f"{spread}; {advice} the spread, which is that of an ordinary flow model's velocity"
            )
        if spread is None:
            return predict_x0(velocity, x, sigma)
        return single_gaussian(velocity_to_x0(velocity, x, sigma), sigma, spread)

    return denoise


def reversed_time(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a velocity network for `denoiser_of` from one whose time runs from noise to data.

    Such a network takes t = 1 - sigma, 0 for noise and 1 for data, and predicts
    dx/dt = x_0 - eps = -u, as the models of facebookresearch/flow_matching do on their path of
    conditional optimal transport.

    Args:
        network: called as network(x, t, ...), with t (B,); returns dx/dt, (B, C, *S).

    Returns:
        A function of (x, sigma, ...) that returns u; further arguments go to the network.
    """
    return lambda x, sigma, *args, **named: -network(x, 1 - sigma, *args, **named)


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
        ValueError: a label is no integer or out of range, or the network cannot be guided.
    """
    config = network.config
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}; give the numbers of classes, such as int64")
    null = config.num_classes  # label for "no class", where the network has one
    largest = null if getattr(config, "null_class", True) else null - 1
    if null and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= largest:
        raise ValueError(
            f"labels between {int(labels.min())} and {int(labels.max())} do not fit a model of "
            f"{null} classes"
        )
    if guidance is not None and not guidance.idle:
        _check_can_be_guided(config, largest == null)
    guide = None if guidance is None else form_of(guidance.of_velocities)
    both = torch.cat([labels, torch.full_like(labels, null)])

    def denoise(x: Tensor, sigma: Tensor) -> Policy:
        if guidance is None or not guidance.acts_at(sigma):
            return predict_x0(network(x, sigma, labels.to(x.device)), x, sigma)
        batch = torch.cat([x, x]), torch.cat([sigma, sigma]), both.to(x.device)
        cond, uncond = network(*batch).chunk(2)
        return guide(cond, uncond, x, sigma)

    return denoise


def _check_can_be_guided(config: Any, has_null: bool) -> None:
    """Check that guidance can steer a network of this config.

    Raises:
        ValueError: it knows no classes, has no label for no class, or predicts no mixture.
    """
    if config.num_classes == 0:
        raise ValueError("guidance needs a model of classes, and this one knows none; omit it")
    if not has_null:
        raise ValueError(
            "guidance needs a model with a label for no class, and this one has none; "
            "use autoguidance instead"
        )
    if getattr(config, "dx_segment", None) is not None:
        raise ValueError("guidance needs a mixture, and this model predicts a DX policy; omit it")


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
