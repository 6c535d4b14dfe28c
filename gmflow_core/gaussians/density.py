"""The log-density of a Gaussian mixture in little memory: the forward pass keeps nothing of the size of the means, and the
backward pass makes their gradient and nothing else of that size."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)
MAX_LOG_PRECISION = 80.0  # its exponential times a distance of 0 is still 0 in float32
LARGE = (
    2**18
)  # elements of the means from which saving memory also saves time: what a core's cache does not hold


def log_density(
    x: Tensor, means: Tensor, log_weights: Tensor, log_std: Tensor, gain: Tensor | None = None
) -> Tensor:
    """log sum_k w_k N(x; gain means_k, std^2 I) per pixel in nats, with the 2 pi term: (B, *S). Differentiable twice; large
    mixtures not in forward mode.

    Args:
        x: (B, C, *S).
        means, log_weights, log_std: as of `GaussianMixture`.
        gain: broadcastable to (B, 1, 1, *S); 1 if None.
    """
    x = x.unsqueeze(1)
    if means.numel() >= LARGE and x[:, 0].shape == means[:, 0].shape:
        distance = SquaredDistance.apply(x, means, gain)
    else:
        distance = (x - (means if gain is None else gain * means)).square().sum(2, keepdim=True)
    precision = (-2 * log_std).clamp(max=MAX_LOG_PRECISION).exp()
    log_joint = torch.addcmul(log_weights, distance, precision, value=-0.5)
    log_sum = log_joint if means.shape[1] == 1 else log_joint.logsumexp(1, keepdim=True)
    return (log_sum - means.shape[2] * (log_std + 0.5 * LOG_2PI)).squeeze((1, 2))


class SquaredDistance(torch.autograd.Function):
    """sum_c (x_c - gain means_kc)^2: (B, 1, C, *S), (B, K, C, *S), (B, 1, 1, *S) -> (B, K, 1, *S). Not expanded into
    squares and a product, whose difference has no digits left where the standard deviation is small.

    A CPU takes one channel after the other, which stay in its cache; elsewhere a kernel each is more than a channel's work.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, means: Tensor, gain: Tensor | None) -> Tensor:
        one_by_one = _on_cpu(means)
        first, *others = _channels(one_by_one, x, means)
        total = _residual(*first, gain).square_()
        for part in others:
            residual = _residual(*part, gain)
            total.addcmul_(residual, residual)
        return total if one_by_one else total.sum(2, keepdim=True)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, means, gain = ctx.saved_tensors
        factor = -2 * grad if gain is None else -2 * gain * grad
        want_x, _, want_gain = ctx.needs_input_grad
        if want_x or want_gain or torch.is_grad_enabled():
            residual = _residual(x, means, gain)
            to_x = 2 * (grad * residual).sum(1, keepdim=True) if want_x else None
            to_gain = -2 * (grad * residual * means).sum_to_size(gain.shape) if want_gain else None
            return to_x, factor * residual, to_gain
        to_means = torch.empty_like(means)
        points = (
            means.ndim == 3
        )  # their channels lie side by side, and loops over so few values are slow
        for *part, out in _channels(points and _on_cpu(means), x, means, to_means):
            _residual(*part, gain, out).mul_(factor)
        return None, to_means, None


def _residual(x: Tensor, means: Tensor, gain: Tensor | None, out: Tensor | None = None) -> Tensor:
    return (
        torch.sub(x, means, out=out)
        if gain is None
        else torch.addcmul(x, gain, means, value=-1, out=out)
    )


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _channels(one_by_one: bool, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Tensors (B, ., C, *S) channel by channel, or whole."""
    return zip(*(t.split(1, 2) for t in tensors), strict=True) if one_by_one else [tensors]
