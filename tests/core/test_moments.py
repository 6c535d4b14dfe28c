"""Moments of samples of known modes, in one pass."""

import math

import pytest
import torch

from gmflow_core.source.moments import RunningMoments, fit_given_modes
from gmflow_core.source.source import GaussianMixtureSource
from tests.clusters import moments_by_hand
from tests.helpers import normal


@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize("flip", [False, True])
def test_given_modes_against_all_samples_at_once(spherical, flip):
    """Samples are far from the origin: sums of squares in float32 would have no digits left."""
    x, modes = 1000 + 0.1 * normal(300, 3, 4, 4), torch.arange(300) % 4
    chunks = zip(x.split(32), modes.split(32), strict=True)
    source = fit_given_modes(chunks, 4, (3, 4, 4), flip=flip, spherical=spherical)
    means, var = moments_by_hand(x, modes, 4, flip, spherical)
    assert torch.allclose(source.means.double(), means, rtol=3e-7)
    assert torch.allclose(source.std.double().square(), var, rtol=2e-3)
    assert torch.allclose(source.weights, torch.full((4,), 0.25))


def test_empty_modes_are_the_average_of_the_others():
    x, modes = normal(90, 2, 3, 3), torch.arange(90) % 3 * 2  # 1 and 3 are empty
    source = fit_given_modes([(x, modes)], 5, (2, 3, 3))
    assert torch.allclose(source.means[1], source.means[[0, 2, 4]].mean(0), atol=1e-6)
    assert torch.allclose(source.std[3].square(), source.std[[0, 2, 4]].square().mean(0))
    assert source.weights.tolist() == pytest.approx([1 / 3, 0, 1 / 3, 0, 1 / 3])
    assigner = GaussianMixtureSource(normal(5, 4), torch.ones(5, 1), torch.full((5,), 0.2).log())
    assigned = fit_given_modes([(x, modes)], 5, (2, 3, 3), assigner=assigner)
    assert torch.equal(assigned.log_weights, assigner.log_weights)
    assert assigned.assigner.num_modes == 5


def test_given_modes_say_what_does_not_fit():
    moments = RunningMoments(3, (2, 2, 2))
    with pytest.raises(
        ValueError,
        match=r"samples \(4, 2, 2\) of modes \(4,\) came to a mixture of samples \(2, 2, 2\)",
    ):
        moments.add(normal(4, 2, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"modes between 0 and 3 do not fit a mixture of 3 modes"):
        moments.add(normal(4, 2, 2, 2), torch.arange(4))
    x = normal(4, 2, 2, 2)
    x[2, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="rows 2 of 4 samples are not finite"):
        moments.add(x, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="no samples came"):
        moments.source()
