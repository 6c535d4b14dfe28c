"""Choose the machine form: the one place that knows all of them.

Methods of a rollout:

- plain: the definition in `gmflow_core.flow.following`, one substep after the other over the
  whole tensor. It has gradients, and constraints between substeps.
- tiled: tiles of pixels whose whole rollout stays in the cache, in plain torch (`tiled.py`; on a
  GPU `tiled_few_kernels.py`).
- compiled: the tiles compiled by torch.compile (`tiled_compiled.py`): on a CPU it needs a C++
  compiler and ten to thirty seconds for each K and C. Spectral draws (`quantiles.py`), guidance and
  rollouts of few substeps are compiled too.
- triton: all substeps of a block of pixels in one kernel, on a GPU (`triton_kernel.py`).

The user's choice is the argument `method`, or the environment variable GMFLOW_METHOD. Where a
method cannot run, the log says so once and another takes its place.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..flow.path import Sigma, sigmas_between
from ..gaussians.mixture import GaussianMixture, Mixture, TiltedMixture
from ..gaussians.transport import AxisMap, weights_given
from . import quantiles, tiled, tiled_compiled, tiled_few_kernels
from .compiling import NotCompiledError, compiled, decline, declined

Definition = Callable[[Mixture, Tensor, tuple[Sigma, ...]], Tensor]
METHODS = ("plain", "tiled", "compiled", "triton")
METHOD_VARIABLE = "GMFLOW_METHOD"
FEW, FEW_TILTED = 2, 4  # substeps that take less time than the inner products of the tiles
SAMPLED = 256  # pixels of the kernel's self-check
AGREES = 1e-3  # largest difference of two right forms, relative to the largest value


def chosen_method(method: str | None = None) -> str | None:
    """Return `method`, else the environment's GMFLOW_METHOD, else None for automatic.

    Raises:
        ValueError: there is no such method.
    """
    method = method or os.environ.get(METHOD_VARIABLE) or None
    if method is not None and method not in METHODS:
        raise ValueError(
            f"method {method!r} (of the argument, or of {METHOD_VARIABLE}) is unknown; "
            f"use one of {', '.join(METHODS)}"
        )
    return method


def machine_rollout(
    x0: Mixture,
    x: Tensor,
    sigma: Sigma,
    sigma_end: Sigma,
    substeps: int,
    shift: float,
    check: Callable[[], None] | None,
    method: str | None,
    follow: Definition,
) -> Tensor | None:
    """Return the rollout by a machine form, or None where the definition is the one to run.

    Arguments as in `gmflow_core.rollout`; `sigma` and `sigma_end` are both numbers or both tensors.
    `method` is what `chosen_method` returns, and `follow` is the definition.
    """
    few = substeps <= (FEW_TILTED if isinstance(x0, TiltedMixture) else FEW)
    if (
        substeps == 1
        or not x.numel()
        or method == "plain"
        or _has_gradient(x0, x, sigma, sigma_end)
    ):
        return None
    if method is None and few and not x.is_cuda:
        return None
    if method != "compiled" or not few:
        x0 = x0.components()
    arguments = x0, x, sigma, sigma_end, substeps, shift
    result = None
    if method == "triton" or (method is None and x.is_cuda):
        result = _by_triton(*arguments, follow)
    elif method == "compiled" and few:
        sigmas = sigmas_between(sigma, sigma_end, substeps, shift)
        if not isinstance(sigma, Tensor):  # tensors: numbers would be compiled in
            dtype = torch.promote_types(x.dtype, torch.float32)
            sigmas = torch.tensor(sigmas, dtype=dtype, device=x.device).unbind()
        result = form_of(follow, method)(x0, x, sigmas)
    elif method == "compiled":
        return _in_compiled_tiles(*arguments, check)
    if result is None:
        return _in_tiles(*arguments, check)
    if check is not None:
        check()
    return result


def form_of(function: Callable[..., Any], method: str | None = None) -> Callable[..., Any]:
    """Return a function of tensors and mixtures, compiled if the method is "compiled".

    It runs as it stands where autograd records an input, or where torch.compile fails; the log
    says so once. `method` is as in `chosen_method`.
    """

    def run(*arguments: Any) -> Any:
        plain = chosen_method(method) != "compiled" or function in declined
        if plain or _has_gradient(*arguments):
            return function(*arguments)
        try:
            return _compiled_once(function)(*arguments)
        except NotCompiledError as error:
            decline(function, f"{function.__name__} is not compiled", error)
            return function(*arguments)

    return run


_compiled_once = functools.cache(compiled)


def axis_map(device: torch.device) -> AxisMap | None:
    """Return the steps of `from_normal` for a device and the method; None for the plain ones."""
    method = chosen_method()
    if method == "compiled":
        return AxisMap(quantiles.compiled_quantile, form_of(weights_given))
    if method != "plain" and device.type == "cuda":
        return AxisMap(quantiles.quantile_by_sections, weights_given)
    return None


def _has_gradient(*values: Any) -> bool:
    """Return whether autograd records one of the values, or a tensor of a mixture."""
    if not torch.is_grad_enabled():
        return False
    return any(
        _has_gradient(*vars(value).values()) if isinstance(value, Mixture) else value.requires_grad
        for value in values
        if isinstance(value, Mixture | Tensor)
    )


def _in_tiles(x0: Mixture, x: Tensor, *arguments) -> Tensor:
    """Return the rollout in tiles, in the form that suits the device."""
    form = tiled_few_kernels.FEW_KERNELS if x.is_cuda else tiled.IN_CACHE
    return tiled.rollout_in_tiles(x0, x, *arguments, form)


def _in_compiled_tiles(x0: Mixture, *arguments) -> Tensor:
    """Return the rollout in compiled tiles, or in plain ones where torch.compile fails."""
    kind = ("compiled", *x0.means.shape[1:3])
    if kind not in declined:
        try:
            return tiled.rollout_in_tiles(x0, *arguments, _compiled_form(*kind[1:]))
        except NotCompiledError as error:
            decline(kind, "no rollout by torch.compile", error, "tiles do the same")
    return _in_tiles(x0, *arguments)


@functools.cache
def _compiled_form(components: int, channels: int) -> tiled.TileForm:
    """Return the tile form for mixtures of K components and C channels."""
    logging.info(
        "GMFlow: compiling rollouts of K = %d, C = %d: this takes a while", components, channels
    )
    form = tiled_compiled.FORM
    functions = {name: compiled(getattr(form, name)) for name in ("prepare", "advance", "finish")}
    return form._replace(**functions)


def _by_triton(
    x0: Mixture,
    x: Tensor,
    sigma: Sigma,
    sigma_end: Sigma,
    substeps: int,
    shift: float,
    follow: Definition,
) -> Tensor | None:
    """Return the rollout by the kernel, or None where it cannot run or gave wrong numbers.

    The first call of each kind computes some pixels by the definition, too: nobody has run the
    kernel on every GPU, and wrong numbers must not pass silently.
    """
    per_pixel = x0.log_std.shape[3:].numel() > 1
    kind = ("triton", x.device, *x0.means.shape[1:3], isinstance(sigma, Tensor), per_pixel)
    if kind in declined:
        return None
    try:
        from .triton_kernel import rollout_in_one_kernel

        result = rollout_in_one_kernel(x0, x, sigma, sigma_end, substeps, shift)
        if kind not in _checked:
            _check_pixels(result, x0, x, sigmas_between(sigma, sigma_end, substeps, shift), follow)
            _checked.add(kind)
        return result
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, an unknown GPU, no compiler, a mixture too large
        decline(kind, "no rollout by Triton", error, "tiles do the same")
        return None


_checked: set[tuple] = set()  # kinds whose kernel has been found right


def _check_pixels(
    result: Tensor, x0: Mixture, x: Tensor, sigmas: tuple[Sigma, ...], follow: Definition
) -> None:
    """Compare some pixels of a rollout with the definition.

    Raises:
        ValueError: they differ.
    """
    batch, _, _, *space = x0.means.shape
    count = batch * torch.Size(space).numel()
    chosen = torch.linspace(0, count - 1, min(count, SAMPLED), device=x.device).long()

    def pixels(values: Tensor, dims: int) -> Tensor:
        """Return the chosen pixels of (B or 1, ..., *S or *1), as points."""
        parts = values.shape[1:dims]
        values = values.expand(batch, *parts, *space).reshape(batch, *parts, -1)
        return values.movedim(-1, 1).flatten(0, 1)[chosen]

    mixture = GaussianMixture(*(pixels(each, 3) for each in (x0.means, x0.log_weights, x0.log_std)))
    sigmas = [pixels(each, 2) if isinstance(each, Tensor) else each for each in sigmas]
    expected = follow(mixture, pixels(x, 2), sigmas)
    expected, found = (each[expected.isfinite()] for each in (expected, pixels(result, 2)))
    if not len(expected):
        return
    error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    if not error <= AGREES:
        raise ValueError(
            f"its numbers differ from the definition's by {error:.3g} of the largest one; "
            "please report this with the name of your GPU"
        )
