"""Convert between the shapes of ComfyUI's latents and of solvers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import comfy.model_base
import torch
from torch import Tensor

from ...gmflow_core.flow.blended import Window
from ...gmflow_core.models.adapter_heads import HeadLayout
from .adapter_info import adapter_of


def to_points(latent: Tensor) -> Tensor:
    """Convert a latent (B, 2, *S) to points (B * numel(S), 2)."""
    return latent.movedim(1, -1).reshape(-1, latent.shape[1])


def to_latent(points: Tensor, shape: torch.Size) -> Tensor:
    """Convert points back to a latent of this shape: the inverse of `to_points`."""
    return points.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


class SolverShape:
    """Shape that a solver works in: that of the latents, (B, C, *S)."""

    folded = 1  # pixels of the solver's shape from side to side of a latent's

    def to_solver(self, latent: Tensor) -> Tensor:
        """Convert a latent to the solver's shape."""
        return latent

    def from_solver(self, x: Tensor, latent_shape: torch.Size) -> Tensor:
        """Convert back to a latent of this shape: the inverse of `to_solver`."""
        return x

    def window(self, area: Sequence[int] | None, dimensions: int) -> Window | None:
        """Return the slices of an area of a latent; None if the solver's shape has no such part.

        Args:
            area: sizes and then offsets, as ComfyUI has them; None is the whole latent.
            dimensions: of the latent, after the channels.
        """
        if area is None:
            return (slice(None),) * dimensions
        sizes, offsets = area[: len(area) // 2], area[len(area) // 2 :]
        return tuple(
            slice(self.folded * offset, self.folded * (offset + size))
            for size, offset in zip(sizes, offsets, strict=True)
        )


class PointShape(SolverShape):
    """Shape for 2-D models: every point is a sample of its own."""

    def to_solver(self, latent: Tensor) -> Tensor:
        """Convert (B, 2, *S) to (B * numel(S), 2)."""
        return to_points(latent)

    def from_solver(self, x: Tensor, latent_shape: torch.Size) -> Tensor:
        """Convert back to a latent of this shape: the inverse of `to_solver`."""
        return to_latent(x, latent_shape)

    def window(self, area: Sequence[int] | None, dimensions: int) -> Window | None:
        """Return the window of all points; None for an area, as points lie in no order."""
        return () if area is None else None


@dataclass(frozen=True)
class FoldedShape(SolverShape):
    """Shape for latents whose channels hold p x p pixels of the mixture."""

    layout: HeadLayout

    @property
    def folded(self) -> int:
        """Pixels of the solver's shape from side to side of a latent's."""
        return self.layout.folded

    def to_solver(self, latent: Tensor) -> Tensor:
        """Convert (B, C p^2, h, w) to (B, C, p h, p w)."""
        return self.layout.unfold(latent)

    def from_solver(self, x: Tensor, latent_shape: torch.Size) -> Tensor:
        """Convert back to a latent: the inverse of `to_solver`."""
        return self.layout.fold(x)


def solver_shape(model: comfy.model_base.BaseModel, model_options: dict | None) -> SolverShape:
    """Return the solver's shape for a model with these options."""
    if getattr(model.diffusion_model, "of_points", False):
        return PointShape()
    adapter = adapter_of(model_options)
    if adapter is not None and adapter.base.layout.folded > 1:
        return FoldedShape(adapter.base.layout)
    return SolverShape()
