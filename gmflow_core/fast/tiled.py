"""The rollout in tiles of pixels: each tile's whole rollout stays in the cache.

With o the mixture's mean at the start, D_k = mean_k - o, and x = (1 - sigma) o + z, the posterior
mean is o + scale (sum_k w_k D_k + var (alpha z - beta z_start)). So z = source z_start + r, with a
number `source` and r in the span of the D_k; and the logits of the weights w need <D_k, z_start>,
which is known, and <D_k, r>. A tile follows either r itself, or the coordinates c_k of
r = sum_k c_k D_k, with <D_k, r> from the K x K Gram matrix of the D_k: whichever multiplies less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..flow.path import MIN_SIGMA, Sigma, expand_sigma, sigma_between
from ..gaussians.mixture import Mixture
from ..gaussians.tensors import sum_of_products, widest

TILE = {"cpu": 1 << 15, "gpu": 1 << 20}  # pixels times components of a tile (on a CPU, a thread)


class TileForm(NamedTuple):
    """One form of the three steps of a tile's rollout.

    Args:
        prepare, advance, finish: as the functions of these names below.
        use_gram: says by K, C and number of substeps whether to follow the coordinates.
        group: number of substeps that `advance` takes in one call.
        pad: fill the last group with substeps that do nothing, so that all are of one size.
    """

    prepare: Callable[..., tuple[Tensor, ...]]
    advance: Callable[..., Tensor]
    finish: Callable[..., Tensor]
    use_gram: Callable[[int, int, int], bool]
    group: int
    pad: bool = False


def rollout_in_tiles(
    x0: Mixture,
    x: Tensor,
    sigma: Sigma,
    sigma_end: Sigma,
    substeps: int,
    shift: float,
    check: Callable[[], None] | None,
    form: TileForm,
) -> Tensor:
    """Return the rollout of at least two substeps; arguments as in `gmflow_core.rollout`."""
    batch, components, channels = x0.means.shape[:3]
    pixels = x.shape[2:].numel()
    means = x0.means.reshape(batch, components, channels, pixels)
    log_weights = x0.log_weights.reshape(batch, components, pixels)
    points = x.to(torch.promote_types(x.dtype, means.dtype)).reshape(batch, channels, pixels)
    times = expand_sigma(sigma, x), expand_sigma(sigma_end, x), x0.log_std.squeeze(1)
    numbers = [_per_pixel(each, x) for each in times]
    idle = -(substeps - 1) % form.group if form.pad else 0
    settings = substeps, idle, shift, means.dtype
    shared = all(each.numel() == 1 for each in numbers)
    coefficients = step_coefficients(*numbers, *settings) if shared else None
    gram = form.use_gram(components, channels, substeps)
    samples, size = _tile_size(x, components, pixels)
    result = torch.empty_like(points)
    for b in range(0, batch, samples):
        for p in range(0, pixels, size):
            tile = slice(b, b + samples), slice(p, p + size)
            out = _part(result, tile)
            shape = out.shape[::2]
            own = coefficients or step_coefficients(*(_part(n, tile) for n in numbers), *settings)
            parts = (_pixels_last(_part(each, tile)) for each in (means, log_weights, points))
            x_end = _roll_tile(*parts, *own, shape, gram, form, check)
            out.copy_(x_end.unflatten(-1, shape).movedim(-2, 0))
            del x_end, own
    return result.reshape(x.shape)


def _tile_size(x: Tensor, components: int, pixels: int) -> tuple[int, int]:
    """Return how many samples, and how many pixels of each, a tile has."""
    cpu = x.device.type == "cpu"
    size = TILE["cpu"] * torch.get_num_threads() if cpu else TILE["gpu"]
    size = max(1, size // components)
    samples = max(1, size // pixels)
    size = 16 * math.ceil(pixels / math.ceil(pixels / size) / 16)  # tiles of about equal size
    return samples, size + 16 if size % 256 == 0 else size  # rows 256 apart share cache sets


def _per_pixel(values: Tensor, x: Tensor) -> Tensor:
    """Reshape (B or 1, 1, *S or *1) to (B or 1, pixels or 1), in float64 if the device has it."""
    if values.shape[2:].numel() > 1:
        values = values.expand(-1, 1, *x.shape[2:])
    return values.reshape(len(values), -1).to(widest(x.device))


def _part(values: Tensor, tile: tuple[slice, slice]) -> Tensor:
    """Return a tile of (B or 1, ..., pixels or 1)."""
    values = values[tile[0]] if values.shape[0] > 1 else values
    return values[..., tile[1]] if values.shape[-1] > 1 else values


def _pixels_last(values: Tensor) -> Tensor:
    """Reshape (samples, ..., pixels) to (..., n), contiguous along n."""
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
    form: TileForm,
    check: Callable[[], None] | None,
) -> Tensor:
    """Return x at the end, (C, n), for a tile of n pixels of `shape` (samples, pixels of each).

    Args:
        means: (K, C, n).
        log_weights: (K, n).
        x: (C, n).
        steps, frame: of `step_coefficients`, (substeps, 5, s, p) and (3, s, p), with s and p as in
            `shape`, or 1.
        gram: follow the coordinates c (K, n) instead of r (C, n).
    """
    signal, signal_end, source = _of_pixels(frame, shape)
    origin, z, *products = form.prepare(means, log_weights, x, signal, gram)
    state = torch.zeros_like(log_weights if gram else x)
    for group in steps[1:].split(form.group):  # r stays 0 in the first substep
        state = form.advance(state, products, log_weights, _of_pixels(group, shape), gram)
        if check is not None:
            check()
    return form.finish(state, origin, z, means, signal_end, source, gram)


def step_coefficients(
    start: Tensor,
    end: Tensor,
    log_std: Tensor,
    substeps: int,
    idle: int,
    shift: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return what the substeps need besides means and weights, from numbers (s, p) or (1, 1).

    Returns:
        steps: (substeps + idle, 5, s, p): the factors of |D_k|^2, <D_k, z_start> and <D_k, r> in
            the logits; then r after the substep is (4th) r + (5th) sum_k w_k D_k.
        frame: (3, s, p): 1 - sigma, 1 - sigma_end, and `source` at the end.
    """
    var = (2 * log_std).exp()
    parts = torch.arange(1, substeps, dtype=start.dtype, device=start.device).div(substeps)
    start, end = torch.broadcast_tensors(start, end)
    between = sigma_between(start, end, parts.reshape(-1, 1, 1), shift)
    sigmas = torch.cat([start[None], between, end[None]])
    now, following = sigmas[:-1].clamp(min=MIN_SIGMA), sigmas[1:]
    signal, ratio = (1 - now) / now, following / now
    alpha, quadratic = signal / now, signal.square() - signal[:1].square()
    beta = alpha[0]
    scale = (1 + var * quadratic).clamp(min=1e-6).reciprocal()
    gain = (1 - ratio) * scale
    decay = ratio + gain * var * alpha
    # source' = decay source - gain var beta, from 1 on: a linear recurrence, solved by the
    # products of the decays; after the last substep they may be 0, so that one is explicit
    kept, one = decay[1:-1].cumprod(0), torch.ones_like(decay[:1])
    later = kept * (ratio[0] - beta * (gain[1:-1] * var / kept).cumsum(0))
    source = torch.cat([one, one * ratio[:1], later])
    ahead = alpha * source - beta
    source = ratio[-1] * source[-1] + gain[-1] * var * ahead[-1]
    steps = (-0.5 * scale * quadratic, scale * ahead, scale * alpha, decay, gain)
    steps = torch.stack(torch.broadcast_tensors(*steps), 1)
    frame = torch.stack(torch.broadcast_tensors(1 - now[0], 1 - end, source))
    if idle:
        nothing = torch.zeros_like(steps[:1])
        nothing[:, 3] = 1
        steps = torch.cat([steps, nothing.expand(idle, -1, -1, -1)])
    return steps.to(dtype), frame.to(dtype)


def _of_pixels(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Reshape (..., s, p) to (..., n), or to (..., 1) where all pixels share it."""
    shared = values.shape[-2:] == (1, 1)
    return values[..., 0] if shared else values.expand(*values.shape[:-2], *shape).flatten(-2)


def prepare(
    means: Tensor, log_weights: Tensor, x: Tensor, signal: Tensor, gram: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the inner products of a tile.

    Returns:
        o and z_start, (C, n); the Gram matrix (K, K, n), or else D_k as (C, K, n); |D_k|^2 and
        <D_k, z_start>, (K, n).
    """
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
    rows = [means.new_zeros(components - k, count) for k in range(components)]  # upper triangle
    for c in range(channels):
        offsets = means[:, c] - origin[c]
        along.addcmul_(offsets, z[c])
        for k, row in enumerate(rows):
            row.addcmul_(offsets[k:], offsets[k])
    every = range(components)
    inner = torch.stack([rows[min(k, j)][abs(k - j)] for k in every for j in every])
    norms = torch.stack([row[0] for row in rows])
    return origin, z, inner.unflatten(0, (components, components)), norms, along


def advance(
    state: Tensor, products: list[Tensor], log_weights: Tensor, coefficients: Tensor, gram: bool
) -> Tensor:
    """Take a group of T Euler steps.

    Args:
        state: coordinates c (K, n), or r (C, n).
        products: the last three tensors of `prepare`.
        log_weights: (K, n).
        coefficients: (T, 5, 1 or n).
    """
    inner, norms, along = products
    for of_norm, of_source, of_state, decay, gain in (e.unbind(0) for e in coefficients.unbind(0)):
        logits = torch.addcmul(log_weights, norms, of_norm).addcmul_(along, of_source)
        for row, factor in zip(inner.unbind(0), (state * of_state).unbind(0), strict=True):
            logits.addcmul_(row, factor)
        weights = logits.softmax(0)
        drift = weights if gram else (inner * weights).sum(1)
        state = torch.addcmul(state * decay, drift, gain)
    return state


def finish(
    state: Tensor,
    origin: Tensor,
    z: Tensor,
    means: Tensor,
    signal_end: Tensor,
    source: Tensor,
    gram: bool,
) -> Tensor:
    """Return x at the end, (C, n)."""
    end = source * z
    if not gram:
        return end.addcmul_(origin, signal_end).add_(state)
    end.addcmul_(origin, signal_end - state.sum(0))
    for mean, coordinate in zip(means, state, strict=True):
        end.addcmul_(mean, coordinate)
    return end


def gram_is_cheaper(components: int, channels: int, substeps: int) -> bool:
    """Return whether following the coordinates takes fewer multiplications than following r."""
    return (components + 1) / 2 * channels + substeps * components < 2 * substeps * channels


IN_CACHE = TileForm(prepare, advance, finish, gram_is_cheaper, 1)  # rows stay in a CPU's cache
