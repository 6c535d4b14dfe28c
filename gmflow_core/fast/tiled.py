"""The rollout in tiles: the same numbers as `gmflow_core.sampling.rollout`, in plain torch, with less memory traffic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..flow.path import MIN_SIGMA, Sigma, _sigma_between, expand_sigma
from ..gaussians.mixture import GaussianMixture
from ..gaussians.tensors import sum_of_products

Check = Callable[[], None]
TILE = {
    "cpu": 1 << 15,
    "gpu": 1 << 20,
}  # pixels times components: on a CPU a thread's, which torch splits no further


# In tiles
#
# With o the mixture's mean at the start, D_k = mean_k - o, and x = (1 - sigma) o + z, the posterior mean is
# o + scale (sum_k w_k D_k + var (alpha z - beta z_start)). So z = source z_start + r with a number `source` and r in the span
# of the D_k, and the logits of the weights w need <D_k, z_start>, which is known, and <D_k, r>. Either r itself is followed, or
# the coordinates c_k of r = sum_k c_k D_k, and <D_k, r> comes from the K x K Gram matrix of the D_k: what multiplies less.
def _tiled(
    x0: GaussianMixture,
    x: Tensor,
    sigma: Sigma,
    sigma_end: Sigma,
    substeps: int,
    shift: float,
    check: Check | None,
    code: Code,
) -> Tensor:
    batch, components, channels = x0.means.shape[:3]
    pixels = x.shape[2:].numel()
    means = x0.means.reshape(batch, components, channels, pixels)
    log_weights = x0.log_weights.reshape(batch, components, pixels)
    points = x.to(torch.promote_types(x.dtype, means.dtype)).reshape(batch, channels, pixels)
    idle = (
        -(substeps - 1) % code.together
    )  # substeps that do nothing, so that all are taken in whole groups
    numbers = [
        _per_pixel(each, x)
        for each in (expand_sigma(sigma, x), expand_sigma(sigma_end, x), x0.log_std.squeeze(1))
    ]
    settings = substeps, idle, shift, means.dtype
    coefficients = (
        _coefficients(*numbers, *settings) if all(each.numel() == 1 for each in numbers) else None
    )
    gram = code.gram(components, channels, substeps)
    size = TILE["cpu"] * torch.get_num_threads() if x.device.type == "cpu" else TILE["gpu"]
    size = max(1, size // components)
    samples = max(1, size // pixels)
    size = 16 * math.ceil(
        pixels / math.ceil(pixels / size) / 16
    )  # as equal as whole vectors of numbers allow
    if size % 256 == 0:
        size += 16  # or all rows of a tile would compete for the same places of the cache
    result = torch.empty_like(points)
    for b in range(0, batch, samples):
        for p in range(0, pixels, size):
            tile = slice(b, b + samples), slice(p, p + size)
            out = _part(result, tile)
            own = coefficients or _coefficients(*(_part(each, tile) for each in numbers), *settings)
            parts = (_pixels_last(_part(each, tile)) for each in (means, log_weights, points))
            x_end = _roll_tile(*parts, *own, out.shape[::2], gram, code, check)
            out.copy_(x_end.unflatten(-1, out.shape[::2]).movedim(-2, 0))
            del x_end, own
    return result.reshape(x.shape)


def _per_pixel(values: Tensor, x: Tensor) -> Tensor:
    """Broadcastable to (B, 1, *S) -> (B or 1, pixels or 1), in double precision where the device has it."""
    if values.shape[2:].numel() > 1:
        values = values.expand(-1, 1, *x.shape[2:])
    return values.reshape(len(values), -1).to(
        torch.float32 if x.device.type == "mps" else torch.float64
    )


def _part(values: Tensor, tile: tuple[slice, slice]) -> Tensor:
    """A tile of (B or 1, ..., pixels or 1)."""
    values = values[tile[0]] if values.shape[0] > 1 else values
    return values[..., tile[1]] if values.shape[-1] > 1 else values


def _pixels_last(values: Tensor) -> Tensor:
    """(samples, ..., pixels) -> (..., n), side by side in memory."""
    values = values.movedim(0, -2).flatten(-2)
    return values if values.stride(-1) == 1 else values.contiguous()


def _roll_tile(
    means: Tensor,
    log_weights: Tensor,
    x: Tensor,
    steps: Tensor,
    frame: Tensor,
    shape: tuple[int, int],
    gram: bool,
    code: Code,
    check: Check | None,
) -> Tensor:
    """The rollout of a tile of n pixels of `shape` (samples, pixels of each).

    Args:
        means: (K, C, n); log_weights: (K, n); x: (C, n).
        steps, frame: of `_coefficients`, (substeps, 5, s, p) and (3, s, p), with s and p as in `shape` or 1.
        gram: follow the coordinates c (K, n) instead of r (C, n).
    """
    signal, signal_end, source = _of_pixels(frame, shape)
    origin, z, *products = code.prepare(means, log_weights, x, signal, gram)
    state = torch.zeros_like(log_weights if gram else x)
    for coefficients in steps[1:].split(
        code.together
    ):  # at the first the posterior is the mixture itself, and r stays 0
        state = code.advance(
            state, tuple(products), log_weights, _of_pixels(coefficients, shape), gram
        )
        if check is not None:
            check()
    return code.finish(state, origin, z, means, signal_end, source, gram)


def _prepare(
    means: Tensor, log_weights: Tensor, x: Tensor, signal: Tensor, gram: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o and z_start, (C, n); the Gram matrix (K, K, n) or else D_k as (C, K, n); |D_k|^2 and <D_k, z_start>, (K, n)."""
    components, channels, count = means.shape
    origin = sum_of_products(means, log_weights.exp().unsqueeze(1), 0).squeeze(0)
    z = x - signal * origin
    along = means.new_zeros(components, count)
    if not gram:
        inner = means.transpose(0, 1) - origin.unsqueeze(1)
        norms = torch.zeros_like(along)
        for c in range(channels):
            along.addcmul_(inner[c], z[c])
            norms.addcmul_(inner[c], inner[c])
        return origin, z, inner, norms, along
    rows = [
        means.new_zeros(components - k, count) for k in range(components)
    ]  # of the upper triangle
    for c in range(channels):
        offsets = means[:, c] - origin[c]
        along.addcmul_(offsets, z[c])
        for k, row in enumerate(rows):
            row.addcmul_(offsets[k:], offsets[k])
    inner = torch.stack(
        [rows[min(k, j)][abs(k - j)] for k in range(components) for j in range(components)]
    )
    return (
        origin,
        z,
        inner.unflatten(0, (components, components)),
        torch.stack([row[0] for row in rows]),
        along,
    )


def _advance(
    state: Tensor,
    products: tuple[Tensor, ...],
    log_weights: Tensor,
    coefficients: Tensor,
    gram: bool,
) -> Tensor:
    """c (K, n) or r (C, n) after as many Euler steps as there are `coefficients`, (T, 5, 1 or n); products: `_prepare`'s."""
    inner, norms, along = products
    for of_norm, of_source, of_state, decay, gain in (
        each.unbind(0) for each in coefficients.unbind(0)
    ):
        logits = torch.addcmul(log_weights, norms, of_norm).addcmul_(along, of_source)
        for row, factor in zip(inner.unbind(0), (state * of_state).unbind(0), strict=True):
            logits.addcmul_(row, factor)
        weights = logits.softmax(0)
        drift = weights if gram else (inner * weights).sum(1)
        state = torch.addcmul(state * decay, drift, gain)
    return state


def _finish(
    state: Tensor,
    origin: Tensor,
    z: Tensor,
    means: Tensor,
    signal_end: Tensor,
    source: Tensor,
    gram: bool,
) -> Tensor:
    """x at the end, (C, n)."""
    end = source * z
    if not gram:
        return end.addcmul_(origin, signal_end).add_(state)
    end.addcmul_(origin, signal_end - state.sum(0))
    for mean, coordinate in zip(means, state, strict=True):
        end.addcmul_(mean, coordinate)
    return end


def _fewer_with_gram(components: int, channels: int, substeps: int) -> bool:
    """Whether the Gram matrix saves multiplications."""
    return (components + 1) / 2 * channels + substeps * components < 2 * substeps * channels


class Code(NamedTuple):
    """`_prepare`, `_advance` and `_finish`; whether they are to follow the coordinates, by K, C and the number of substeps; and
    how many substeps the second is to take together."""

    prepare: Callable[..., tuple[Tensor, ...]]
    advance: Callable[..., Tensor]
    finish: Callable[..., Tensor]
    gram: Callable[[int, int, int], bool]
    together: int


EAGER = Code(_prepare, _advance, _finish, _fewer_with_gram, 1)


def _coefficients(
    start: Tensor,
    end: Tensor,
    log_std: Tensor,
    substeps: int,
    idle: int,
    shift: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What the substeps of a rollout need besides the mixture's means and weights, from numbers (s, p) or (1, 1).

    Returns:
        steps (substeps + idle, 5, s, p): the factors in the logits of |D_k|^2, <D_k, z_start> and <D_k, r>; and r after the
        substep is (the 4th) r + (the 5th) sum_k w_k D_k.
        frame (3, s, p): 1 - sigma, 1 - sigma_end, and `source` at the end.
    """
    var = (2 * log_std).exp()
    parts = (
        torch.arange(1, substeps, dtype=start.dtype, device=start.device)
        .div(substeps)
        .reshape(-1, 1, 1)
    )
    start, end = torch.broadcast_tensors(start, end)
    sigmas = torch.cat([start[None], _sigma_between(start, end, parts, shift), end[None]])
    now, following = sigmas[:-1].clamp(min=MIN_SIGMA), sigmas[1:]
    signal, ratio = (1 - now) / now, following / now
    alpha, quadratic = signal / now, signal.square() - signal[:1].square()
    beta = alpha[0]
    scale = (1 + var * quadratic).clamp(min=1e-6).reciprocal()
    gain = (1 - ratio) * scale
    decay = ratio + gain * var * alpha
    # source' = decay source - gain var beta from the first ratio on, before which it is 1: solved by the products of the decays
    kept, one = decay[1:-1].cumprod(0), torch.ones_like(decay[:1])
    source = torch.cat(
        [one, one * ratio[:1], kept * (ratio[0] - beta * (gain[1:-1] * var / kept).cumsum(0))]
    )
    ahead = alpha * source - beta
    source = (
        ratio[-1] * source[-1] + gain[-1] * var * ahead[-1]
    )  # after the last, which decays to 0 at sigma 0
    steps = (-0.5 * scale * quadratic, scale * ahead, scale * alpha, decay, gain)
    steps = torch.stack(torch.broadcast_tensors(*steps), 1)
    frame = torch.stack(torch.broadcast_tensors(1 - now[0], 1 - end, source))
    if idle:
        nothing = torch.zeros_like(steps[:1])
        nothing[:, 3] = 1
        steps = torch.cat([steps, nothing.expand(idle, -1, -1, -1)])
    return steps.to(dtype), frame.to(dtype)


def _of_pixels(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """(..., s, p) -> (..., n), or (..., 1) where all pixels share it."""
    shared = values.shape[-2:] == (1, 1)
    return values[..., 0] if shared else values.expand(*values.shape[:-2], *shape).flatten(-2)
