"""Random numbers from a generator that the caller passes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Generator = torch.Generator | Sequence[torch.Generator]  # one for the batch, or one per sample


def standard_normal(shape: tuple[int, ...], generator: Generator | None, *, like: Tensor) -> Tensor:
    """Draw N(0, 1) numbers with the device and dtype of `like`.

    The generator's device draws them, so a CPU generator gives the same numbers for every device.

    Args:
        shape: (B, ...).
        generator: one for the batch; or one per sample, so that a sample's numbers do not depend
            on the rest of its batch; torch's default generator if None.

    Raises:
        ValueError: the number of generators differs from B.
    """
    return draw_like(torch.randn, shape, generator, like)


def draw_like(
    distribution: Callable[..., Tensor],
    shape: tuple[int, ...],
    generator: Generator | None,
    like: Tensor,
) -> Tensor:
    """Draw as `standard_normal` does, from another distribution, such as torch.rand."""
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(
                f"{len(generator)} generators do not fit a batch of {shape[0]}; "
                "give one for each sample"
            )
        return torch.stack([draw_like(distribution, shape[1:], each, like) for each in generator])
    device = like.device if generator is None else generator.device
    pinned = like.is_cuda and device.type == "cpu"  # pinned memory: the copy needs no sync
    drawn = distribution(shape, generator=generator, device=device, pin_memory=pinned)
    return drawn.to(like, non_blocking=True)
