"""Convert between the shapes of ComfyUI latents and of solvers."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.samplers
import torch
from torch import Tensor

from ...gmflow_core.models.adapter_heads import HeadLayout
from .options import adapter_of


# The solver's shape
def to_points(latent: Tensor) -> Tensor:
    """(B, 2, *S) -> (B * numel(S), 2)."""
    return latent.movedim(1, -1).reshape(-1, latent.shape[1])


def to_latent(points: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `to_points` for a latent of that shape."""
    return points.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


class SolverShape:
    """How a model's latents, (B, C, *S), become what a solver works on."""

    def to_solver(self, latent: Tensor) -> Tensor:
        """A latent in the solver's shape."""
        return latent

    def from_solver(self, x: Tensor, latent_shape: torch.Size) -> Tensor:
        """The inverse of `to_solver`."""
        return x


class PointShape(SolverShape):
    """Of a 2-D model every point is a sample of its own."""

    def to_solver(self, latent: Tensor) -> Tensor:
        """(B, 2, *S) -> (B * numel(S), 2)."""
        return to_points(latent)

    def from_solver(self, x: Tensor, latent_shape: torch.Size) -> Tensor:
        """The inverse of `to_solver`."""
        return to_latent(x, latent_shape)


@dataclass(frozen=True)
class FoldedShape(SolverShape):
    """Latents that hold pixels of the mixture in their channels."""

    layout: HeadLayout

    def to_solver(self, latent: Tensor) -> Tensor:
        """(B, C p^2, h, w) -> (B, C, p h, p w)."""
        return self.layout.unfold(latent)

    def from_solver(self, x: Tensor, latent_shape: torch.Size) -> Tensor:
        """The inverse of `to_solver`."""
        return self.layout.fold(x)


def solver_shape(model: comfy.model_base.BaseModel, model_options: dict | None) -> SolverShape:
    """That of a model with these options."""
    if getattr(model.diffusion_model, "of_points", False):
        return PointShape()
    adapter = adapter_of(model_options)
    return (
        FoldedShape(adapter.layout)
        if adapter is not None and adapter.layout.folded > 1
        else SolverShape()
    )
