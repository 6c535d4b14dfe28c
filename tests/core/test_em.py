"""EM of Gaussian mixtures: against scikit-learn, in chunks, stopped and started again."""

import math

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from gmflow_core.source import em as source_fit
from gmflow_core.source.em import fit_mixture, kmeans_plus_plus
from gmflow_core.source.source import GaussianMixtureSource
from tests.clusters import clusters, same_source
from tests.helpers import F64


def start_at(x, modes, std=1.2):
    log_weights = torch.full((modes,), -math.log(modes), dtype=F64)
    return GaussianMixtureSource(x[:modes], torch.full((modes, 1), std, dtype=F64), log_weights)


def scikit_learns(x, start, kind):
    precisions = start.std.reciprocal().square()
    given = precisions.flatten() if kind == "spherical" else precisions.expand_as(start.means)
    return GaussianMixture(
        start.num_modes,
        covariance_type=kind,
        means_init=start.means.numpy(),
        precisions_init=given.numpy(),
        weights_init=start.weights.numpy(),
    ).fit(x.numpy())


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-9), (torch.float32, 5e-5)])
@pytest.mark.parametrize("kind", ["diag", "spherical"])
def test_equals_scikit_learn_from_the_same_start(kind, dtype, tolerance):
    x = clusters()
    start = start_at(x, 6)
    there = scikit_learns(x, start, kind)
    here = fit_mixture(x, 6, start=start, spherical=kind == "spherical", dtype=dtype)
    assert len(here.log_likelihoods) == there.n_iter_
    assert here.converged
    assert here.log_likelihoods[-1] == pytest.approx(there.lower_bound_, abs=tolerance)
    assert np.allclose(here.source.means, there.means_, rtol=tolerance)
    assert np.allclose(here.source.weights, there.weights_, rtol=10 * tolerance)
    assert np.allclose(
        here.source.std.square(), there.covariances_.reshape(6, -1), rtol=tolerance, atol=tolerance
    )
    assert here.source.is_spherical == (kind == "spherical")


def test_its_own_start_is_as_good_as_scikit_learns():
    x = clusters(modes=12, count=2000)
    ours = [fit_mixture(x, 12, seed=seed).log_likelihoods[-1] for seed in range(3)]
    theirs = [
        GaussianMixture(12, covariance_type="diag", init_params="k-means++", random_state=seed)
        .fit(x.numpy())
        .lower_bound_
        for seed in range(3)
    ]
    assert max(ours) > max(theirs) - 0.05
    assert min(ours) > min(theirs) - 0.1
    assert fit_mixture(x, 12, seed=1).log_likelihoods[-1] == ours[1]


def test_k_means_plus_plus_finds_clusters_that_lie_apart():
    """As far apart as these are, every centre must land in a cluster of its own."""
    generator = torch.Generator().manual_seed(0)
    corners = 100.0 * torch.cartesian_prod(*[torch.arange(3.0)] * 3)  # 27
    x = corners.repeat(40, 1) + torch.randn(1080, 3, generator=generator)
    for seed in range(3):
        nearest = torch.cdist(kmeans_plus_plus(x, 27, seed), corners).argmin(1)
        assert nearest.unique().numel() == 27
    assert len(kmeans_plus_plus(torch.ones(5, 2), 4)) == 4  # nothing is apart from anything


def test_the_start_may_see_a_part_only(monkeypatch):
    monkeypatch.setattr(source_fit, "START_ROWS", (10, 20))
    x = clusters(offset=0.0)
    survey = source_fit.look_at([x], 6, torch.device("cpu"))
    rows = source_fit._subset([x[:700], x[700:]], survey, 6, 0, survey.mean)
    assert rows.shape == (60, 5)
    assert (torch.cdist(rows + survey.mean, x).min(1).values < 1e-6).all()
    assert rows.unique(dim=0).shape == rows.shape
    assert fit_mixture(x, 6, max_iterations=30).source.num_modes == 6


def test_chunks_of_any_size_give_the_same(monkeypatch):
    monkeypatch.setattr(source_fit, "BLOCK", 6 * 250)
    x = clusters().float()
    whole = fit_mixture(x, 6, max_iterations=8)
    for size in (1, 77, 1000):
        parts = fit_mixture(x.split(size), 6, max_iterations=8)
        same_source(parts.source, whole.source)
        assert parts.log_likelihoods == whole.log_likelihoods
    monkeypatch.setattr(source_fit, "BLOCK", 2**24)
    same_source(fit_mixture(x, 6, max_iterations=8).source, whole.source, 1e-4)


def test_a_fit_that_was_stopped_ends_in_the_same_bits(tmp_path):
    x, state = clusters().float(), tmp_path / "state.safetensors"
    whole = fit_mixture(x, 6, max_iterations=9, tolerance=0)

    def stop(done, log_likelihood):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_mixture(x, 6, max_iterations=9, tolerance=0, state=state, progress=stop)
    seen = []
    again = fit_mixture(
        x,
        6,
        max_iterations=9,
        tolerance=0,
        state=state,
        progress=lambda done, log_likelihood: seen.append(done),
    )
    assert seen == [5, 6, 7, 8, 9]
    assert again.log_likelihoods == whole.log_likelihoods
    same_source(again.source, whole.source)
    with pytest.raises(ValueError, match="num_modes: 6 there, 5 here"):
        fit_mixture(x, 5, state=state)
    with pytest.raises(ValueError, match="another mean"):
        fit_mixture(x + 1, 6, state=state)


def test_a_mode_that_loses_its_samples_stays_with_the_smallest_variance():
    x = clusters(modes=2, offset=0.0)
    means = torch.cat([x[:2], torch.full((1, 5), 1e4, dtype=F64)])
    start = GaussianMixtureSource(
        means, torch.ones(3, 1, dtype=F64), torch.full((3,), 1 / 3, dtype=F64).log()
    )
    source = fit_mixture(x, 3, start=start, dtype=F64, reg_covar=1e-4).source
    assert torch.allclose(source.means[2], means[2])
    assert torch.allclose(source.std[2], torch.tensor(0.01, dtype=F64))
    assert source.weights[2] < 1e-12
    assert source.weights[:2].min() > 0.1


def test_bad_tokens_are_named():
    x = clusters(count=100).float()
    with pytest.raises(
        ValueError, match=r"100 samples cannot be fitted with 101 modes; give 1 to 100"
    ):
        fit_mixture(x, 101)
    broken = x.clone()
    broken[[3, 64], 1] = torch.tensor([math.nan, math.inf])
    with pytest.raises(ValueError, match=r"rows 3, 64 of 100 tokens are not finite"):
        fit_mixture(broken.split(30), 4)
    with pytest.raises(
        ValueError, match=r"a chunk of tokens is \(100, 4\) after ones of 5 numbers"
    ):
        fit_mixture([x, x[:, :4]], 4)
    with pytest.raises(ValueError, match="only once"):
        fit_mixture(iter([x]), 4)
    with pytest.raises(
        ValueError, match=r"the log-likelihood is (nan|-inf) at iteration 1: .* too large"
    ):
        fit_mixture(1e25 * x, 4)
