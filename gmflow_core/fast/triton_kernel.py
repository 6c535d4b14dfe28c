"""The rollout in one Triton kernel: a block of pixels reads its mixture once.

All substeps find what they need in registers. `tiled.py` explains the mathematics and the names.
Run on no GPU yet: tried in Triton's interpreter, and compiled for compute capability 8.0 and 9.0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..flow.path import MIN_SIGMA, Sigma, expand_sigma
from ..gaussians.mixture import Mixture

MAX_REGISTERS = 256  # numbers of a pixel that fit a thread's registers
BLOCK = 32  # pixels of a block: one warp, so that sums over components stay inside a thread
SMALLEST = tl.constexpr(MIN_SIGMA)


def rollout_in_one_kernel(
    x0: Mixture, x: Tensor, sigma: Sigma, sigma_end: Sigma, substeps: int, shift: float
) -> Tensor:
    """Return the rollout of at least two substeps; arguments as in `gmflow_core.rollout`.

    Raises:
        ValueError: the mixture does not fit the registers, or is not in float32.
    """
    batch, components, channels = x0.means.shape[:3]
    gram = components <= channels
    rows = triton.next_power_of_2(components)
    columns = triton.next_power_of_2(components if gram else channels)
    dtype = torch.promote_types(x0.means.dtype, x.dtype)
    if rows * columns + 6 * rows > MAX_REGISTERS or dtype != torch.float32:
        kind = f"K = {components}, C = {channels} in {dtype}"
        raise ValueError(f"a mixture of {kind} does not fit the kernel's registers")
    pixels = x.shape[2:].numel()
    source = x.float().contiguous()
    result = torch.empty_like(source)
    numbers = not isinstance(sigma, Tensor) and not isinstance(sigma_end, Tensor)
    if numbers:
        times = float(sigma), float(sigma_end)
    else:
        times = _full(expand_sigma(sigma, x), x), _full(expand_sigma(sigma_end, x), x)
    log_std = x0.log_std.squeeze(1)
    per_pixel = log_std.shape[2:].numel() > 1
    if per_pixel:
        log_std = _full(log_std, x)
    else:
        log_std = log_std.expand(batch, *log_std.shape[1:]).contiguous()
    mixture = x0.means.contiguous(), x0.log_weights.contiguous(), log_std
    counts = substeps, batch * pixels, pixels
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _kernel[(triton.cdiv(batch * pixels, BLOCK),)](
            *mixture,
            source,
            result,
            *times,
            float(shift),
            *counts,
            K=components,
            C=channels,
            ROWS=rows,
            COLUMNS=columns,
            GRAM=gram,
            NUMBERS=numbers,
            PER_PIXEL=per_pixel,
            BLOCK=BLOCK,
            num_warps=1,
        )
    return result


def _full(values: Tensor, x: Tensor) -> Tensor:
    """Expand values that broadcast to (B, 1, *S) to one per pixel."""
    return values.expand(x.shape[0], 1, *x.shape[2:]).contiguous()


@triton.jit
def _time(first, last, substep, substeps, shift):
    """Return sigma after `substep` substeps."""
    t = first + (last - first) * (substep / substeps)
    return shift * t / (1 + (shift - 1) * t)


@triton.jit
def _step_numbers(now, following, var, signal_start, beta, source):
    """Return the coefficients of a substep, as `step_coefficients` of tiled.py, and the source."""
    now = tl.maximum(now, SMALLEST)
    signal = (1 - now) / now
    alpha = signal / now
    quadratic = (signal - signal_start) * (signal + signal_start)
    scale = 1 / tl.maximum(1 + var * quadratic, 1e-6)
    ratio = following / now
    gain = (1 - ratio) * scale
    ahead = alpha * source - beta
    return (
        -0.5 * scale * quadratic,
        scale * ahead,
        scale * alpha,
        ratio + gain * var * alpha,
        gain,
        ratio * source + gain * var * ahead,
    )


@triton.jit
def _unshift(sigma, shift):
    """Return the time before the shift."""
    return sigma / (shift + (1 - shift) * sigma)


@triton.jit
def _channel(means, x, weights, c, k, stride, there, inside, signal, C: tl.constexpr):
    """Return a channel of the components' means (ROWS, BLOCK), of o and of z_start (BLOCK,)."""
    component = tl.load(means[None, :] + (k * C + c) * stride, there, 0.0)
    origin = tl.sum(weights * component, 0)
    return component, origin, tl.load(x + c * stride, inside, 0.0) - signal * origin


@triton.jit
def _gram(
    means, x, weights, k, stride, there, inside, signal,
    K: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the Gram matrix, |D_k|^2 and <D_k, z_start>."""
    inner = tl.zeros((ROWS, COLUMNS, BLOCK), tl.float32)
    norms, along = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for c in range(C):
        component, origin, z = _channel(means, x, weights, c, k, stride, there, inside, signal, C)
        offset = tl.where(k < K, component - origin[None, :], 0.0)
        norms += offset * offset
        along += offset * z[None, :]
        inner += offset[:, None, :] * offset[None, :, :]
    return inner, norms, along


@triton.jit
def _integrate(
    inner, norms, along, base_weights, sigma, sigma_end, var, shift, substeps,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, GRAM: tl.constexpr,
):  # fmt: skip
    """Take all substeps; return the coordinates of r, or r itself, and the source at the end."""
    first, last = _unshift(sigma, shift), _unshift(sigma_end, shift)
    now = tl.maximum(sigma, SMALLEST)
    signal_start = (1 - now) / now
    beta = signal_start / now
    following = _time(first, last, 1.0, substeps, shift)
    source = tl.full((BLOCK,), 1.0, tl.float32)
    _norm, _source, _state, _decay, _gain, source = _step_numbers(
        sigma, following, var, signal_start, beta, source
    )
    state = tl.zeros((COLUMNS, BLOCK), tl.float32)  # r stays 0 in the first substep
    for substep in range(1, substeps):
        sigma = following
        following = tl.where(
            substep == substeps - 1, sigma_end, _time(first, last, substep + 1.0, substeps, shift)
        )
        of_norm, of_source, of_state, decay, gain, source = _step_numbers(
            sigma, following, var, signal_start, beta, source
        )
        logits = base_weights + of_norm[None, :] * norms + of_source[None, :] * along
        logits += of_state[None, :] * tl.sum(inner * state[None, :, :], 1)
        shares = tl.exp(logits - tl.max(logits, 0)[None, :])
        shares = shares * (gain / tl.sum(shares, 0))[None, :]
        drift = shares if GRAM else tl.sum(inner * shares[:, None, :], 0)
        state = decay[None, :] * state + drift
    return state, source


@triton.jit
def _kernel(
    means,  # (B, K, C, P)
    log_weights,  # (B, K, P)
    log_std,  # (B, P) if PER_PIXEL, else (B,)
    x,  # (B, C, P)
    result,  # (B, C, P)
    start,  # numbers, or (B, P) without NUMBERS
    end,
    shift,
    substeps,
    count,  # B P
    pixels,  # P
    K: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,  # K and what is followed, C or K, rounded up to powers of 2
    COLUMNS: tl.constexpr,
    GRAM: tl.constexpr,
    NUMBERS: tl.constexpr,
    PER_PIXEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    sample, pixel = index // pixels, index % pixels
    stride = tl.zeros((), tl.int64) + pixels  # of a channel
    if NUMBERS:
        zeros = tl.zeros((BLOCK,), tl.float32)
        sigma, sigma_end = start + zeros, end + zeros
    else:
        sigma, sigma_end = tl.load(start + index, inside, 1.0), tl.load(end + index, inside, 0.5)
    var = tl.exp(2 * tl.load(log_std + (index if PER_PIXEL else sample), inside, 0.0))
    signal = 1 - tl.maximum(sigma, SMALLEST)
    k = tl.arange(0, ROWS)[:, None]
    there = (k < K) & inside[None, :]
    weights_at = log_weights + (sample * K * stride + pixel)[None, :] + k * stride
    base_weights = tl.where(k < K, tl.load(weights_at, there, 0.0), float("-inf"))
    weights = tl.exp(base_weights)
    point = sample * C * stride + pixel  # channel 0
    x, result = x + point, result + point
    means += sample * K * C * stride + pixel  # component 0, channel 0
    if GRAM:
        inner, norms, along = _gram(
            means, x, weights, k, stride, there, inside, signal, K, C, ROWS, COLUMNS, BLOCK
        )
    else:
        row, c = tl.arange(0, ROWS)[:, None, None], tl.arange(0, COLUMNS)[None, :, None]
        known = (row < K) & (c < C) & inside[None, None, :]
        component = tl.load(means[None, None, :] + (row * C + c) * stride, known, 0.0)
        origin = tl.sum(weights[:, None, :] * component, 0)
        channel = tl.arange(0, COLUMNS)[:, None] * stride
        within = (tl.arange(0, COLUMNS)[:, None] < C) & inside[None, :]
        z = tl.load(x[None, :] + channel, within, 0.0) - signal[None, :] * origin
        inner = tl.where(row < K, component - origin[None, :, :], 0.0)
        norms, along = tl.sum(inner * inner, 1), tl.sum(inner * z[None, :, :], 1)
    state, source = _integrate(
        inner, norms, along, base_weights, sigma, sigma_end, var, shift, substeps,
        COLUMNS, BLOCK, GRAM,
    )  # fmt: skip
    if GRAM:
        total = tl.sum(state, 0)
        for c in range(C):
            component, origin, z = _channel(
                means, x, weights, c, k, stride, there, inside, signal, C
            )
            value = source * z + (1 - sigma_end - total) * origin + tl.sum(state * component, 0)
            tl.store(result + c * stride, value, inside)
    else:
        value = source[None, :] * z + (1 - sigma_end)[None, :] * origin + state
        tl.store(result[None, :] + channel, value, within)
