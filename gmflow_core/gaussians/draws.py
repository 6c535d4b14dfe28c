"""Random numbers from a generator that the caller passes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Generator = torch.Generator | Sequence[torch.Generator]  # one for all samples, or one for each


def standard_normal(shape: tuple[int, ...], generator: Generator | None, *, like: Tensor) -> Tensor:
    """N(0, 1) draws with the device and dtype of `like`, drawn where the generator lives (so that a CPU generator gives
    the same numbers whatever the device of the maths). With one generator for each sample, a sample's numbers do not
    depend on what else is in its batch."""
    return draw_like(torch.randn, shape, generator, like)


def draw_like(
    distribution: Callable[..., Tensor],
    shape: tuple[int, ...],
    generator: Generator | None,
    like: Tensor,
) -> Tensor:
    """As `standard_normal`, of another distribution: torch.rand, for example."""
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(
                f"{len(generator)} generators do not fit a batch of {shape[0]}; give one for each sample"
            )
        return torch.stack([draw_like(distribution, shape[1:], each, like) for each in generator])
    device = like.device if generator is None else generator.device
    pinned = like.is_cuda and device.type == "cpu"  # so that the copy is not waited for
    return distribution(shape, generator=generator, device=device, pin_memory=pinned).to(
        like, non_blocking=True
    )
