"""Mixtures from and for torch.distributions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from .mixture import GaussianMixture, Mixture

TOLERANCE = 1e-5  # relative difference up to which standard deviations count as one


def to_distribution(mixture: Mixture) -> MixtureSameFamily:
    """Convert a mixture to torch.distributions: batch shape (B, *S), event shape (C,).

    The channels of a sample come last there, so `mixture.log_prob(x)` is
    `to_distribution(mixture).log_prob(x.movedim(1, -1))`.
    """
    own = mixture.components()
    means = own.means.movedim((1, 2), (-2, -1))  # (B, *S, K, C)
    std = own.log_std.exp().movedim((1, 2), (-2, -1)).expand_as(means)
    shares = Categorical(logits=own.log_weights.squeeze(2).movedim(1, -1))
    return MixtureSameFamily(shares, Independent(Normal(means, std), 1))


def from_distribution(distribution: Distribution) -> GaussianMixture:
    """Convert a mixture of torch.distributions, the inverse of `to_distribution`.

    Args:
        distribution: a MixtureSameFamily of Normal (C = 1), Independent(Normal, 1) or
            MultivariateNormal, with one standard deviation for all components and channels. Its
            batch shape becomes (B, *S); an empty one becomes B = 1.

    Raises:
        ValueError: it is of another family, or has several standard deviations or correlations.
    """
    if not isinstance(distribution, MixtureSameFamily):
        raise ValueError(f"{_name(distribution)} is no MixtureSameFamily; only that is converted")
    means, std = _normals(distribution.component_distribution)  # (*batch, K, C)
    least, most = (each((-2, -1), keepdim=True) for each in (std.amin, std.amax))
    if ((most - least) > TOLERANCE * most).any():
        raise ValueError(
            f"the components have standard deviations from {least.min().item():.6g} to "
            f"{most.max().item():.6g}; a GaussianMixture has one for all components and channels "
            "of a pixel"
        )
    logits = distribution.mixture_distribution.logits.unsqueeze(-1)  # (*batch, K, 1)
    if means.ndim == 2:
        means, std, logits = (t.unsqueeze(0) for t in (means, std, logits))
    parts = (means, logits.log_softmax(-2), std[..., :1, :1].log())
    return GaussianMixture(*(part.movedim((-2, -1), (1, 2)) for part in parts))


def _normals(components: Distribution) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations of Gaussian components, (*batch, K, C)."""
    if isinstance(components, Normal):
        return components.mean.unsqueeze(-1), components.stddev.unsqueeze(-1)
    independent = isinstance(components, Independent) and len(components.event_shape) == 1
    if independent and isinstance(components.base_dist, Normal):
        return components.mean, components.stddev
    if isinstance(components, MultivariateNormal):
        covariance = components.covariance_matrix
        diagonal = covariance.diagonal(dim1=-2, dim2=-1)
        beside = (covariance - torch.diag_embed(diagonal)).abs().amax((-2, -1))
        if (beside > TOLERANCE * diagonal.amax(-1)).any():
            raise ValueError(
                f"the components have covariances of up to {beside.max().item():.6g} between "
                "channels; those of a GaussianMixture are isotropic"
            )
        return components.mean, diagonal.sqrt()
    raise ValueError(
        f"components of {_name(components)} are not converted; give Normal, Independent(Normal, 1) "
        "or MultivariateNormal"
    )


def _name(distribution: object) -> str:
    """Return the type's name, with that of an Independent's base."""
    name = type(distribution).__name__
    if isinstance(distribution, Independent):
        base = type(distribution.base_dist).__name__
        return f"{name}({base}, {distribution.reinterpreted_batch_ndims})"
    return name
