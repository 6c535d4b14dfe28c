"""Log-density of a Gaussian mixture in little memory.

The forward pass keeps nothing of the size of the means, and the backward pass makes their gradient
and one temporary of that size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)
MAX_LOG_PRECISION = 80.0  # its exponential times a distance of 0 is still 0 in float32


def log_density(
    x: Tensor, means: Tensor, log_weights: Tensor, log_std: Tensor, gain: Tensor | None = None
) -> Tensor:
    """Return log sum_k w_k N(x; gain means_k, std^2 I) per pixel in nats, with the 2 pi term.

    It is twice differentiable, in reverse mode.

    Args:
        x: (B, C, *S).
        means, log_weights, log_std: as in `GaussianMixture`.
        gain: broadcastable to (B, 1, 1, *S); 1 if None.

    Returns:
        (B, *S).
    """
    distance = SquaredDistance.apply(x.unsqueeze(1), means, gain)
    precision = (-2 * log_std).clamp(max=MAX_LOG_PRECISION).exp()
    log_joint = torch.addcmul(log_weights, distance, precision, value=-0.5)
    log_sum = log_joint if means.shape[1] == 1 else log_joint.logsumexp(1, keepdim=True)
    return (log_sum - means.shape[2] * (log_std + 0.5 * LOG_2PI)).squeeze((1, 2))


class SquaredDistance(torch.autograd.Function):
    """sum_c (x_c - gain means_kc)^2, which keeps no residual for the backward pass.

    Shapes: (B, 1, C, *S), (B, K, C, *S), (B, 1, 1, *S) -> (B, K, 1, *S). It is not expanded into
    squares and a product, whose difference has no digits left where the std is small.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, means: Tensor, gain: Tensor | None) -> Tensor:
        """Accumulate the squared distance channel by channel: no temporary has the means' size."""
        total = None
        for channel in zip(x.split(1, 2), means.split(1, 2), strict=True):
            residual = _residual(*channel, gain)
            total = residual.square() if total is None else total.addcmul_(residual, residual)
        return total

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        """Save the inputs."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x, the means and the gain, from residuals computed again."""
        x, means, gain = ctx.saved_tensors
        want_x, _, want_gain = ctx.needs_input_grad
        factor = -2 * grad if gain is None else -2 * gain * grad
        broadcast = x[:, 0].shape != means[:, 0].shape
        if want_x or want_gain or broadcast or torch.is_grad_enabled():
            residual = _residual(x, means, gain)
            to_x = (2 * grad * residual).sum_to_size(x.shape) if want_x else None
            to_gain = -2 * (grad * residual * means).sum_to_size(gain.shape) if want_gain else None
            return to_x, (factor * residual).sum_to_size(means.shape), to_gain
        to_means = torch.empty_like(means)
        for *inputs, out in zip(*(t.split(1, 2) for t in (x, means, to_means)), strict=True):
            out.copy_(_residual(*inputs, gain).mul_(factor))
        return None, to_means, None


def _residual(x: Tensor, means: Tensor, gain: Tensor | None) -> Tensor:
    return x - means if gain is None else torch.addcmul(x, gain, means, value=-1)
