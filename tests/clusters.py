"""Clusters to fit, moments by hand, and the comparison of sources."""

import torch

from tests.helpers import F64

FIELDS = ("means", "std", "log_weights")


def clusters(count=1500, dims=5, modes=6, seed=0, offset=20.0):
    """Draw samples (count, dims) of overlapping clusters far from the origin, float64."""
    generator = torch.Generator().manual_seed(seed)
    centres = offset + 2 * torch.randn(modes, dims, generator=generator, dtype=F64)
    std = 0.4 + torch.rand(modes, dims, generator=generator, dtype=F64)
    label = torch.randint(0, modes, (count,), generator=generator)
    return centres[label] + std[label] * torch.randn(count, dims, generator=generator, dtype=F64)


def same_source(one, other, tolerance=0.0):
    """Check that two sources are equal up to a relative tolerance; 0: bit by bit."""
    for name in FIELDS:
        a, b = getattr(one, name), getattr(other, name)
        assert (
            torch.equal(a, b)
            if tolerance == 0
            else torch.allclose(a, b, rtol=tolerance, atol=tolerance)
        ), name
    return True


def moments_by_hand(x, modes, num_modes, flip, spherical):
    """Return mean and variance of each mode in float64, from all of its samples at once."""
    x = torch.cat([x, x.flip(-1)]) if flip else x
    modes = torch.cat([modes, modes]) if flip else modes
    means, variances = [], []
    for mode in range(num_modes):
        mine = x[modes == mode].double()
        means.append(mine.mean(0))
        var = mine.var(0, correction=0)
        variances.append(var.mean().view(1, 1, 1) if spherical else var)
    return torch.stack(means), torch.stack(variances)
