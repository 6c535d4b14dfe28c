"""The rollout of `gmflow_core.rollout` in one kernel: a block of pixels reads its mixture once, and its substeps find what they
need in registers. What is computed, and under which names, is said there ("In tiles")."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..flow.path import MIN_SIGMA, Sigma, expand_sigma
from ..gaussians.mixture import Mixture

LARGEST = 256  # numbers of a pixel that fit a thread's registers
BLOCK = 32  # pixels of a block: one warp, so that sums over components stay inside a thread
SMALLEST = tl.constexpr(MIN_SIGMA)


def rollout_in_one_kernel(
    x0: Mixture, x: Tensor, sigma: Sigma, sigma_end: Sigma, substeps: int, shift: float
) -> Tensor:
    """As `rollout` of at least two substeps, without gradients or constraints.

    Raises:
        ValueError: the mixture does not fit the registers, or is not in float32.
    """
    batch, components, channels = x0.means.shape[:3]
    gram = components <= channels
    rows, columns = (
        triton.next_power_of_2(components),
        triton.next_power_of_2(components if gram else channels),
    )
    if (
        rows * columns + 6 * rows > LARGEST
        or x0.means.dtype != torch.float32
        or x.dtype == torch.float64
    ):
        kind = f"K = {components}, C = {channels} in {torch.promote_types(x0.means.dtype, x.dtype)}"
        raise ValueError(f"a mixture of {kind} does not fit the kernel's registers")
    pixels = x.shape[2:].numel()
    source = x.float().contiguous()
    result = torch.empty_like(source)
    numbers = not isinstance(sigma, Tensor) and not isinstance(sigma_end, Tensor)
    times = [
        float(each) if numbers else _full(expand_sigma(each, x), x) for each in (sigma, sigma_end)
    ]
    log_std = x0.log_std.squeeze(1)
    per_pixel = log_std.shape[2:].numel() > 1
    log_std = (
        _full(log_std, x) if per_pixel else log_std.expand(batch, *log_std.shape[1:]).contiguous()
    )
    with torch.cuda.device_of(x):  # where Triton launches
        _kernel[(triton.cdiv(batch * pixels, BLOCK),)](
            x0.means.contiguous(),
            x0.log_weights.contiguous(),
            log_std,
            source,
            result,
            *times,
            float(shift),
            substeps,
            batch * pixels,
            pixels,
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
    """Broadcastable to (B, 1, *S) -> one for each pixel."""
    return values.expand(x.shape[0], 1, *x.shape[2:]).contiguous()


@triton.jit
def _time(first, last, substep, substeps, shift):
    """sigma after that many substeps; the last is `following` of the caller."""
    t = first + (last - first) * (substep / substeps)
    return shift * t / (1 + (shift - 1) * t)


@triton.jit
def _step_numbers(now, following, var, signal_start, beta, source):
    """The factors of |D_k|^2, <D_k, z_start> and <D_k, r> in the logits, of r and of sum_k w_k D_k in the new r; the source."""
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
        sigma, sigma_end = (
            start + tl.zeros((BLOCK,), tl.float32),
            end + tl.zeros((BLOCK,), tl.float32),
        )
    else:
        sigma, sigma_end = tl.load(start + index, inside, 1.0), tl.load(end + index, inside, 0.5)
    var = tl.exp(2 * tl.load(log_std + (index if PER_PIXEL else sample), inside, 0.0))
    first, last = (
        sigma / (shift + (1 - shift) * sigma),
        sigma_end / (shift + (1 - shift) * sigma_end),
    )
    now = tl.maximum(sigma, SMALLEST)
    signal_start = (1 - now) / now
    beta = signal_start / now

    k = tl.arange(0, ROWS)[:, None]
    there = (k < K) & inside[None, :]
    base_weights = tl.load(
        log_weights + (sample * K * stride + pixel)[None, :] + k * stride, there, 0.0
    )
    base_weights = tl.where(k < K, base_weights, float("-inf"))
    weights = tl.exp(base_weights)
    point = sample * C * stride + pixel  # of x, in channel 0
    mean = sample * K * C * stride + pixel  # of component 0, in channel 0

    if GRAM:
        inner = tl.zeros((ROWS, COLUMNS, BLOCK), tl.float32)
        norms, along = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
        for c in range(C):
            component = tl.load(means + mean[None, :] + (k * C + c) * stride, there, 0.0)
            origin = tl.sum(weights * component, 0)
            z = tl.load(x + point + c * stride, inside, 0.0) - (1 - now) * origin
            offset = tl.where(k < K, component - origin[None, :], 0.0)
            norms += offset * offset
            along += offset * z[None, :]
            inner += offset[:, None, :] * offset[None, :, :]
    else:
        row, c = tl.arange(0, ROWS)[:, None, None], tl.arange(0, COLUMNS)[None, :, None]
        known = (row < K) & (c < C) & inside[None, None, :]
        component = tl.load(means + mean[None, None, :] + (row * C + c) * stride, known, 0.0)
        origin = tl.sum(weights[:, None, :] * component, 0)
        channel = tl.arange(0, COLUMNS)[:, None]
        within = (channel < C) & inside[None, :]
        z = (
            tl.load(x + point[None, :] + channel * stride, within, 0.0)
            - (1 - now)[None, :] * origin
        )
        inner = tl.where(row < K, component - origin[None, :, :], 0.0)
        norms, along = tl.sum(inner * inner, 1), tl.sum(inner * z[None, :, :], 1)

    following = _time(first, last, 1.0, substeps, shift)
    source = tl.full((BLOCK,), 1.0, tl.float32)
    _norm, _source, _state, _decay, _gain, source = _step_numbers(
        sigma, following, var, signal_start, beta, source
    )
    state = tl.zeros((COLUMNS, BLOCK), tl.float32)  # of r: at the first substep it stays 0
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

    if GRAM:
        total = tl.sum(state, 0)
        for c in range(C):
            component = tl.load(means + mean[None, :] + (k * C + c) * stride, there, 0.0)
            origin = tl.sum(weights * component, 0)
            z = tl.load(x + point + c * stride, inside, 0.0) - (1 - now) * origin
            value = source * z + (1 - sigma_end - total) * origin + tl.sum(state * component, 0)
            tl.store(result + point + c * stride, value, inside)
    else:
        value = source[None, :] * z + (1 - sigma_end)[None, :] * origin + state
        tl.store(result + point[None, :] + channel * stride, value, within)
