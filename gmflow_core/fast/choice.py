"""Which machine form of a rollout runs."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from ..flow.path import Sigma
from ..gaussians.mixture import GaussianMixture
from .compiling import NotCompiled, compiled, declined, log_once
from .tiled import Code, _tiled


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
    from . import tiled_compiled as fused

    logging.info(
        "GMFlow: compiling rollouts of K = %d, C = %d: this takes a while, now and for a second size",
        components,
        channels,
    )
    return Code(
        *map(compiled, (fused.prepare, fused.advance, fused.finish)),
        fused.few_enough,
        fused.TOGETHER,
    )


def _by_triton(
    x0: GaussianMixture, x: Tensor, sigma: Sigma, sigma_end: Sigma, substeps: int, shift: float
) -> Tensor | None:
    """The rollout, or None where Triton, or what this takes of it, is missing."""
    kind = ("triton", x.device.type, *x0.means.shape[1:3])
    if kind in declined:
        return None
    try:
        from .triton_kernel import rollout_in_one_kernel

        return rollout_in_one_kernel(x0, x, sigma, sigma_end, substeps, shift)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # not installed, a GPU that it does not know, a compiler that is missing, too large a mixture
        declined.add(kind)
        _say_once("triton", f"{type(error).__name__}: {error}".splitlines()[0])
        return None


def _say_once(method: str, why: object) -> None:
    log_once(f"GMFlow: no rollout by {method} ({why}); tiles do the same")
