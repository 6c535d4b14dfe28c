"""Doors of mixture sources: files, published pickles, states of fits."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gmflow_core.source.em import fit_mixture
from gmflow_core.source.files import load_source, read_source_metadata, save_source
from gmflow_core.source.moments import RunningMoments
from gmflow_core.source.pickles import convert_pickle
from gmflow_core.source.source import GaussianMixtureSource
from training import fit_source

from .door import Door

SETTINGS = {"data": "here", "modes": 3, "processes": 1}


def small_source(modes: int = 3, shape: tuple[int, ...] = (4,), assigner=None):
    """Return a random source."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(modes, *shape, generator=generator)
    std = torch.full((modes, *[1] * len(shape)), 0.5)
    return GaussianMixtureSource(means, std, torch.full((modes,), 1 / modes).log(), assigner)


def numbers_of(source: GaussianMixtureSource) -> list:
    """Return the numbers of a source and of its assigner."""
    own = [source.means, source.std, source.log_weights.exp()]
    return own + (numbers_of(source.assigner) if source.assigner is not None else [])


def make_source(folder: Path) -> None:
    """Write a source of latents with the mixture of its tokens."""
    source = small_source(3, (2, 4, 4), small_source())
    facts = {"config": {"encoder": "mae", "modes": 3}, "tokens": {"encoder": "x"}}
    save_source(source, folder / "source.safetensors", facts=facts, data={"space": "rae"})


def use_source(folder: Path) -> Any:
    """Load a source, by its file and by its folder, and draw from it."""
    read_source_metadata(folder)
    source = load_source(folder / "source.safetensors")
    return numbers_of(source)


def make_pickles(folder: Path) -> None:
    """Write mixtures as published: NumPy, scikit-learn's estimator, several protocols."""
    import joblib
    from sklearn.mixture import GaussianMixture

    x = np.random.default_rng(0).normal(size=(60, 3))
    fitted = GaussianMixture(2, covariance_type="diag", random_state=0).fit(x)
    arrays = {
        "means": fitted.means_.astype(np.float32),
        "covs": fitted.covariances_,
        "weights": fitted.weights_,
    }
    for protocol in (2, 4, 5):
        (folder / f"dict{protocol}.pkl").write_bytes(pickle.dumps(arrays, protocol))
    (folder / "estimator.pkl").write_bytes(pickle.dumps(fitted, 4))
    lists = {name: list(value) for name, value in arrays.items()}
    (folder / "lists.pkl").write_bytes(pickle.dumps(lists, 4))
    joblib.dump(fitted, folder / "estimator.joblib")


def use_pickles(folder: Path) -> Any:
    """Convert each pickle; the first that is refused ends it."""
    return [numbers_of(convert_pickle(path)) for path in sorted(folder.iterdir())]


def use_pickle(folder: Path) -> Any:
    """Convert a pickle as the command does."""
    path, out = folder / "mixture.pkl", folder.parent / "out" / "source.safetensors"
    fit_source.main(["convert", str(path), "--out", str(out)])
    return numbers_of(load_source(out))


def make_pickle(folder: Path) -> None:
    """Write one pickle of arrays."""
    generator = np.random.default_rng(0)
    arrays = {"means": generator.normal(size=(3, 2)), "vars": np.ones((3, 2)), "pi": np.ones(3) / 3}
    (folder / "mixture.pkl").write_bytes(pickle.dumps(arrays, 4))


def data() -> torch.Tensor:
    """Return the tokens of a small fit."""
    return torch.randn(60, 3, generator=torch.Generator().manual_seed(0))


def make_em(folder: Path) -> None:
    """Write the state of a fit after two iterations."""
    fit_mixture(data(), 3, max_iterations=2, state=folder / "em.safetensors")


def use_em(folder: Path) -> Any:
    """Resume a fit."""
    fit = fit_mixture(data(), 3, max_iterations=4, state=folder / "em.safetensors")
    return [*numbers_of(fit.source), *fit.log_likelihoods]


def new_moments() -> RunningMoments:
    """Return empty moments."""
    return RunningMoments(3, (2, 2, 2))


def make_moments(folder: Path) -> None:
    """Write the moments of some samples."""
    moments = new_moments()
    moments.add(torch.randn(30, 2, 2, 2), torch.arange(30) % 3)
    moments.save(folder / "moments.safetensors", SETTINGS)


def use_moments(folder: Path) -> Any:
    """Resume the moments, and make a source of them."""
    moments = new_moments()
    moments.restore(folder / "moments.safetensors", SETTINGS)
    moments.add(torch.randn(30, 2, 2, 2), torch.arange(30) % 3)
    return numbers_of(moments.source())


DOORS = [
    Door("mixture source", make_source, use_source, {"*.safetensors": "safetensors"}, 2),
    Door("pickles", make_pickles, use_pickles, {"*.pkl": "pickle", "*.joblib": "pickle"}, 3),
    Door(
        "pickle by command",
        make_pickle,
        use_pickle,
        {"mixture.pkl": "pickle"},
        0.3,
        command=True,
    ),
    Door("state of EM", make_em, use_em, {"*.safetensors": "safetensors"}, 2),
    Door("running moments", make_moments, use_moments, {"*.safetensors": "safetensors"}, 1),
]
