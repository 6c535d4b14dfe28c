"""Quantiles of 1-D mixtures for machines: few large operations for a GPU, compiled steps for a CPU.

Both solve the equation of `gmflow_core.gaussians.quantile.solve_quantile`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..gaussians.quantile import (
    bracket_quantile,
    flatten_pixels,
    gaussian_and_erfc,
    improve_quantile,
    mixture_quantile,
    solve_quantile,
    start_quantile,
)
from .compiling import NotCompiledError, compiled, decline, declined

SECTIONS = 16
ROUNDS = {torch.float32: 9, torch.float64: 17}  # from 10,000 standard deviations to rounding
STEPS = 3  # of one compiled call, which costs more than some steps of few pixels
# exp(x^2) erfc(x) / t with t = 1 / (1 + 0.7 x), and 2^x: polynomials, lowest coefficient first
ERFCX = (
    0.394955968, 0.394244549, 0.306768922, 0.0455754774, 0.127993712, -0.806998324,
    0.649320037, 0.226533396, -0.628884469, 0.365011722, -0.0745210096,
)  # fmt: skip
EXP2 = (
    1.0, 0.693147206, 0.240226469, 0.0555032878, 0.00961848896, 0.00133999312, 0.000153458116,
)  # fmt: skip


def solve_by_sections(means: Tensor, std: Tensor, log_weights: Tensor, z: Tensor) -> Tensor:
    """Solve for the quantile by dividing the bracket into sections; no gradient, no GPU sync.

    Each round evaluates the tail at all section ends at once: on a GPU, where launching a kernel
    costs more than its work, this takes a fraction of the operations of `solve_quantile`.
    Arguments and result as there.
    """
    unit, state, means, weights = bracket_quantile(*flatten_pixels(means, std, log_weights, z))
    _, low, high, goal = state.unbind(0)
    width = (high - low) / SECTIONS
    ends = torch.arange(1, SECTIONS, device=z.device, dtype=z.dtype).unsqueeze(1)
    for _ in range(ROUNDS[z.dtype]):
        points = torch.addcmul(low, ends, width)  # (SECTIONS - 1, n)
        tail = (points.unsqueeze(1) - means).erfc_().mul_(weights).sum(1)
        low = torch.addcmul(low, (tail > goal).sum(0), width)
        width = width / SECTIONS
    x = torch.addcmul(low, width, ends[0], value=SECTIONS / 2)  # middle of the last section
    return (x * unit).reshape(z.shape)


quantile_by_sections = functools.partial(mixture_quantile, solve=solve_by_sections)


def solve_compiled(means: Tensor, std: Tensor, log_weights: Tensor, z: Tensor) -> Tensor:
    """Solve for the quantile by the compiled steps of `solve_quantile`; no gradient.

    Falls back to the plain steps where torch.compile fails, with one line in the log. Arguments
    and result as there.
    """
    if "quantile" not in declined and z.numel():
        try:
            return solve_quantile(means, std, log_weights, z, _start, _improve)
        except NotCompiledError as error:
            decline("quantile", "no compiled quantiles", error)
    return solve_quantile(means, std, log_weights, z)


compiled_quantile = functools.partial(mixture_quantile, solve=solve_compiled)


@compiled
def _start(means: Tensor, std: Tensor, log_weights: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    return start_quantile(means, std, log_weights, z, gaussian_and_erfc_by_polynomials)


@compiled
def _improve(state: Tensor, means: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    for _ in range(STEPS):
        state, far = improve_quantile(state, means, weights, gaussian_and_erfc_by_polynomials)
    return state, far


def gaussian_and_erfc_by_polynomials(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(-x^2) and erfc(x), |x| <= 9, by polynomials in single precision.

    torch.compile calls erfc and exp2 number by number; polynomials become part of its loops. The
    relative errors are 2e-7 and 3e-7. Double precision takes torch's functions.
    """
    if x.dtype != torch.float32:
        return gaussian_and_erfc(x)
    gaussian = exp2_by_polynomial(x * x * -1.44269504)
    return gaussian, erfc_by_polynomial(x, gaussian)


def exp2_by_polynomial(x: Tensor) -> Tensor:
    """Return 2^x in single precision, -126 <= x < 127.5.

    It is a power of two, made from its bits, times a polynomial in the rest; the fit's relative
    error is 3e-9, and 1e-7 with single precision's rounding.
    """
    whole = x.round()
    rest = x - whole
    value = rest * EXP2[-1] + EXP2[-2]
    for coefficient in EXP2[-3::-1]:
        value = value * rest + coefficient
    return value * ((whole.to(torch.int32) + 127) << 23).view(torch.float32)


def erfc_by_polynomial(x: Tensor, gaussian: Tensor) -> Tensor:
    """Return erfc(x) in single precision, |x| <= 9.2, from exp(-x^2).

    It is that times a polynomial in t = 1 / (1 + 0.7 |x|); the fit's relative error is 2e-8, and
    2.5e-7 with single precision's rounding.
    """
    t = 1 / (1 + 0.7 * x.abs())
    value = t * ERFCX[-1]
    for coefficient in ERFCX[-2::-1]:
        value = (value + coefficient) * t
    upper = value * gaussian
    return torch.where(x < 0, 2 - upper, upper)
