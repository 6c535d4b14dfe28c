"""Log-density of a Gaussian mixture; in little memory where the mixture is large."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)
MAX_LOG_PRECISION = 80.0  # its exponential times a distance of 0 is still 0 in float32
LARGE = 2**18  # elements of the means from which saving memory also saves time on a CPU


def log_density(
    x: Tensor, means: Tensor, log_weights: Tensor, log_std: Tensor, gain: Tensor | None = None
) -> Tensor:
    """Return log sum_k w_k N(x; gain means_k, std^2 I) per pixel in nats, with the 2 pi term.

    It is twice differentiable; mixtures of at least LARGE elements not in forward mode.

    Args:
        x: (B, C, *S).
        means, log_weights, log_std: as in `GaussianMixture`.
        gain: broadcastable to (B, 1, 1, *S); 1 if None.

    Returns:
        (B, *S).
    """
    x = x.unsqueeze(1)
    if means.numel() >= LARGE and x[:, 0].shape == means[:, 0].shape:
        distance = SquaredDistance.apply(x, means, gain)
    else:
        distance = residual(x, means, gain).square().sum(2, keepdim=True)
    precision = (-2 * log_std).clamp(max=MAX_LOG_PRECISION).exp()
    log_joint = torch.addcmul(log_weights, distance, precision, value=-0.5)
    log_sum = log_joint if means.shape[1] == 1 else log_joint.logsumexp(1, keepdim=True)
    return (log_sum - means.shape[2] * (log_std + 0.5 * LOG_2PI)).squeeze((1, 2))


def residual(x: Tensor, means: Tensor, gain: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return x - gain means_k."""
    if gain is None:
        return torch.sub(x, means, out=out)
    return torch.addcmul(x, gain, means, value=-1, out=out)


class SquaredDistance(torch.autograd.Function):
    """sum_c (x_c - gain means_kc)^2, without the residuals that autograd would keep.

    They are of the means' size; the backward pass computes them again. Shapes: (B, 1, C, *S),
    (B, K, C, *S), (B, 1, 1, *S) -> (B, K, 1, *S). It is not expanded into squares and a product,
    whose difference has no digits left where the std is small. On a CPU it goes channel by channel,
    so that no temporary leaves the cache; elsewhere launching a kernel per channel costs more.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, means: Tensor, gain: Tensor | None) -> Tensor:
        """Return the squared distance."""
        by_channel = means.device.type == "cpu"
        first, *others = _parts(by_channel, x, means)
        total = residual(*first, gain).square_()
        for part in others:
            rest = residual(*part, gain)
            total.addcmul_(rest, rest)
        return total if by_channel else total.sum(2, keepdim=True)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        """Save the inputs."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x, the means and the gain, from residuals computed again."""
        x, means, gain = ctx.saved_tensors
        factor = -2 * grad if gain is None else -2 * gain * grad
        want_x, _, want_gain = ctx.needs_input_grad
        if want_x or want_gain or torch.is_grad_enabled():
            rest = residual(x, means, gain)
            to_x = 2 * (grad * rest).sum(1, keepdim=True) if want_x else None
            to_gain = -2 * (grad * rest * means).sum_to_size(gain.shape) if want_gain else None
            return to_x, factor * rest, to_gain
        to_means = torch.empty_like(means)
        points = means.ndim == 3  # whose channels are adjacent in memory
        by_channel = points and means.device.type == "cpu"
        for *part, out in _parts(by_channel, x, means, to_means):
            residual(*part, gain, out).mul_(factor)
        return None, to_means, None


def _parts(by_channel: bool, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Split tensors (B, ., C, *S) into channels, or leave them whole."""
    return zip(*(t.split(1, 2) for t in tensors), strict=True) if by_channel else [tensors]
