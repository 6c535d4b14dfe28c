"""What happens between two network calls: every pixel follows the ODE of its own mixture. The hot path.

`rollout` has one meaning and several ways there, METHODS:

- plain: the definition, one substep after the other over the whole tensor. It has gradients, and constraints between substeps.
- tiled: on its way x stays in the span of the source point and the K means, so that a substep needs their inner products only,
  not the means. They are computed once for a tile of pixels, whose whole rollout then stays in the cache. Plain torch.
- compiled: tiled, with the inner parts compiled by torch.compile: on a CPU with a C++ compiler, and ten to thirty seconds
  for each K and C, in the first rollout and again when a second size comes. With few substeps, the definition compiled.
- triton: all substeps of a block of pixels in one kernel, on a GPU that Triton knows.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .fusing import NotCompiled, chosen_method, compiled, declined, followed, fusible, log_once
from .mixture import GaussianMixture, TiltedMixture, sum_of_products
from .path import MIN_SIGMA, Sigma, expand_sigma, posterior_means, shift_time, unshift_time
from .policy import DXPolicy, Policy

Constrain = Callable[[Tensor, Tensor], Tensor]
Check = Callable[[], None]

FEW, FEW_TILTED = 2, 4  # substeps that are done sooner than the inner products (and a tilted mixture's components) are computed
TILE = {"cpu": 1 << 15, "gpu": 1 << 20}  # pixels times components: on a CPU a thread's, which torch splits no further


def rollout(
    x0: Policy,
    x: Tensor,
    sigma: Sigma,
    sigma_end: Sigma,
    substeps: int,
    *,
    shift: float = 1.0,
    constrain: Constrain | None = None,
    check: Check | None = None,
    method: str | None = None,
) -> Tensor:
    """Integrate dx / dsigma = (x - E[x_0 | x, sigma]) / sigma from sigma down to sigma_end in Euler steps, with the posterior
    mean that the mixture predicted at the start implies on the way (GM-ODE of GMFlow, ICML 2025; the GM policy of pi-Flow), or
    with the x_0 of a DX policy.

    Args:
        x0: mixture of x_0 given (x, sigma), or a DX policy predicted there.
        x: (B, C, *S) at sigma.
        sigma, sigma_end: numbers, one per sample, or broadcastable to (B, 1, *S).
        substeps: number of Euler steps, at least 1; with 1 only the mixture's mean matters.
        shift: the steps are equal in unshifted time, see `shift_time`.
        constrain: called as constrain(x, sigma) after every substep; returns the x to go on with. For masks.
        check: called often, or once after a kernel that does it all; what it raises ends the rollout. For the user's
            interruption.
        method: one of METHODS; None takes the environment's GMFLOW_METHOD, or else the fastest for the tensors' device that
            compiles nothing on a CPU. Gradients, constraints, DX policies and single steps are always plain. Where a method
            cannot run, the log says so once and another takes its place.

    Returns:
        x at sigma_end, (B, C, *S).

    Raises:
        ValueError: `substeps` is no whole number or below 1, or there is no such method.
    """
    if not isinstance(substeps, int) or substeps < 1:
        raise ValueError(f"substeps is {substeps}; a whole number, at least 1, is needed")
    method = chosen_method(method)
    simple = substeps == 1 or constrain is not None or isinstance(x0, DXPolicy) or not x.numel()
    if simple or followed(x0, x, sigma, sigma_end):
        method = "plain"
    if method is None and substeps <= (FEW_TILTED if isinstance(x0, TiltedMixture) else FEW) and not x.is_cuda:
        method = "plain"
    if method == "plain":
        return _plain(x0, x, sigma, sigma_end, substeps, shift, constrain, check)
    if method == "compiled" and substeps <= FEW_TILTED:
        x = _few.compiled(x0, x, _sigmas_between(sigma, sigma_end, substeps, shift, x))
        if check is not None:
            check()
        return x
    sigma, sigma_end = (expand_sigma(each, x) if isinstance(each, Tensor) else each for each in (sigma, sigma_end))
    if method == "triton" or (method is None and x.is_cuda):
        done = _by_triton(x0, x, sigma, sigma_end, substeps, shift)
        if done is not None:
            if check is not None:
                check()
            return done
    arguments = x0, x, sigma, sigma_end, substeps, shift, check
    if method == "compiled":
        done = _compiled(*arguments)
        if done is not None:
            return done
    return _tiled(*arguments, EAGER)


# The definition


def _plain(
    x0: Policy,
    x: Tensor,
    sigma: Sigma,
    sigma_end: Sigma,
    substeps: int,
    shift: float,
    constrain: Constrain | None,
    check: Check | None,
) -> Tensor:
    return _follow(x0, x, _sigmas_between(sigma, sigma_end, substeps, shift, x), constrain, check)


def _sigmas_between(sigma: Sigma, sigma_end: Sigma, substeps: int, shift: float, x: Tensor) -> tuple[Sigma, ...]:
    """Before and after every substep."""
    if isinstance(sigma, Tensor) or isinstance(sigma_end, Tensor):
        sigma, sigma_end = expand_sigma(sigma, x), expand_sigma(sigma_end, x)
    return sigma, *(_sigma_between(sigma, sigma_end, i / substeps, shift) for i in range(1, substeps)), sigma_end


def _follow(
    x0: Policy, x: Tensor, sigmas: tuple[Sigma, ...], constrain: Constrain | None = None, check: Check | None = None
) -> Tensor:
    later_mean = _means_along(x0, x, sigmas[0]) if len(sigmas) > 2 else None
    for substep, (now, following) in enumerate(itertools.pairwise(sigmas)):
        mean = x0.mean() if substep == 0 else later_mean(x, now)
        kept = following / (now.clamp(min=MIN_SIGMA) if isinstance(now, Tensor) else max(now, MIN_SIGMA))
        x = mean + kept * (x - mean)
        if constrain is not None:
            x = constrain(x, expand_sigma(following, x))
        if check is not None:
            check()
    return x


@fusible
def _few(x0: GaussianMixture, x: Tensor, sigmas: tuple[Sigma, ...]) -> Tensor:
    """A rollout of few substeps, which are written out. What the sigmas are made from stays outside: compiled, it would be
    computed again for every few pixels."""
    return _follow(x0, x, sigmas)


def _sigma_between(start: Sigma, end: Sigma, part: float | Tensor, shift: float) -> Sigma:
    """sigma after that part of the way from start to end in unshifted time."""
    first, last = unshift_time(start, shift), unshift_time(end, shift)
    return shift_time(first + (last - first) * part, shift)


def _means_along(x0: Policy, x: Tensor, sigma: Sigma) -> Callable[[Tensor, Sigma], Tensor]:
    """The mean of x_0 as a function of (x, sigma), from a policy predicted at (x, sigma)."""
    if isinstance(x0, DXPolicy):
        return lambda x, sigma: x0.at(sigma)
    return posterior_means(x0, x, sigma)


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
    idle = -(substeps - 1) % code.together  # substeps that do nothing, so that all are taken in whole groups
    numbers = [_per_pixel(each, x) for each in (expand_sigma(sigma, x), expand_sigma(sigma_end, x), x0.log_std.squeeze(1))]
    settings = substeps, idle, shift, means.dtype
    coefficients = _coefficients(*numbers, *settings) if all(each.numel() == 1 for each in numbers) else None
    gram = code.gram(components, channels, substeps)
    size = TILE["cpu"] * torch.get_num_threads() if x.device.type == "cpu" else TILE["gpu"]
    size = max(1, size // components)
    samples = max(1, size // pixels)
    size = 16 * math.ceil(pixels / math.ceil(pixels / size) / 16)  # as equal as whole vectors of numbers allow
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
    return values.reshape(len(values), -1).to(torch.float32 if x.device.type == "mps" else torch.float64)


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
    for coefficients in steps[1:].split(code.together):  # at the first the posterior is the mixture itself, and r stays 0
        state = code.advance(state, tuple(products), log_weights, _of_pixels(coefficients, shape), gram)
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
    rows = [means.new_zeros(components - k, count) for k in range(components)]  # of the upper triangle
    for c in range(channels):
        offsets = means[:, c] - origin[c]
        along.addcmul_(offsets, z[c])
        for k, row in enumerate(rows):
            row.addcmul_(offsets[k:], offsets[k])
    inner = torch.stack([rows[min(k, j)][abs(k - j)] for k in range(components) for j in range(components)])
    return origin, z, inner.unflatten(0, (components, components)), torch.stack([row[0] for row in rows]), along


def _advance(state: Tensor, products: tuple[Tensor, ...], log_weights: Tensor, coefficients: Tensor, gram: bool) -> Tensor:
    """c (K, n) or r (C, n) after as many Euler steps as there are `coefficients`, (T, 5, 1 or n); products: `_prepare`'s."""
    inner, norms, along = products
    for of_norm, of_source, of_state, decay, gain in (each.unbind(0) for each in coefficients.unbind(0)):
        logits = torch.addcmul(log_weights, norms, of_norm).addcmul_(along, of_source)
        for row, factor in zip(inner.unbind(0), (state * of_state).unbind(0), strict=True):
            logits.addcmul_(row, factor)
        weights = logits.softmax(0)
        drift = weights if gram else (inner * weights).sum(1)
        state = torch.addcmul(state * decay, drift, gain)
    return state


def _finish(state: Tensor, origin: Tensor, z: Tensor, means: Tensor, signal_end: Tensor, source: Tensor, gram: bool) -> Tensor:
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
    start: Tensor, end: Tensor, log_std: Tensor, substeps: int, idle: int, shift: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What the substeps of a rollout need besides the mixture's means and weights, from numbers (s, p) or (1, 1).

    Returns:
        steps (substeps + idle, 5, s, p): the factors in the logits of |D_k|^2, <D_k, z_start> and <D_k, r>; and r after the
        substep is (the 4th) r + (the 5th) sum_k w_k D_k.
        frame (3, s, p): 1 - sigma, 1 - sigma_end, and `source` at the end.
    """
    var = (2 * log_std).exp()
    parts = torch.arange(1, substeps, dtype=start.dtype, device=start.device).div(substeps).reshape(-1, 1, 1)
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
    source = torch.cat([one, one * ratio[:1], kept * (ratio[0] - beta * (gain[1:-1] * var / kept).cumsum(0))])
    ahead = alpha * source - beta
    source = ratio[-1] * source[-1] + gain[-1] * var * ahead[-1]  # after the last, which decays to 0 at sigma 0
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


# With compilers


def _compiled(x0: GaussianMixture, *arguments) -> Tensor | None:
    """The rollout, or None where torch.compile fails."""
    kind = ("compiled", *x0.means.shape[1:3])
    if kind in declined:
        return None
    try:
        return _tiled(x0, *arguments, _compiled_code(*kind[1:]))
    except NotCompiled as error:
        declined.add(kind)
        _say_once("compiled", error)
        return None


@functools.cache
def _compiled_code(components: int, channels: int) -> Code:
    """For mixtures of so many components and channels."""
    from . import rollout_compiled as fused

    logging.info(
        "GMFlow: compiling rollouts of K = %d, C = %d: this takes a while, now and for a second size", components, channels
    )
    return Code(*map(compiled, (fused.prepare, fused.advance, fused.finish)), fused.few_enough, fused.TOGETHER)


def _by_triton(x0: GaussianMixture, x: Tensor, sigma: Sigma, sigma_end: Sigma, substeps: int, shift: float) -> Tensor | None:
    """The rollout, or None where Triton, or what this takes of it, is missing."""
    kind = ("triton", x.device.type, *x0.means.shape[1:3])
    if kind in declined:
        return None
    try:
        from .rollout_triton import rollout_in_one_kernel

        return rollout_in_one_kernel(x0, x, sigma, sigma_end, substeps, shift)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # not installed, a GPU that it does not know, a compiler that is missing, too large a mixture
        declined.add(kind)
        _say_once("triton", f"{type(error).__name__}: {error}".splitlines()[0])
        return None


def _say_once(method: str, why: object) -> None:
    log_once(f"GMFlow: no rollout by {method} ({why}); tiles do the same")
