"""Read and write files of a reference: statistics of features, or images.

`training.reference` writes an .npz file with `mu` (D,) and `sigma` (D, D), mean and covariance of
the features, as ADM's evaluator, EDM and others read them; `mu_s` and `sigma_s` of the spatial
features; `features` (n, D) and `saturation` (n,) of n of the images, for precision and recall; the
SHA-256 of the feature network, `features_sha256` (32,); and `made_from`, which tells images and
settings from others, JSON in UTF-8, uint8.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gmflow_core.files.atomic import atomic_write
from gmflow_core.files.errors import FileError, printable, quoted
from gmflow_core.files.json_files import json_object
from gmflow_core.source.pickles import read_statistics_pickle
from training.common.arrays import read_npz
from training.evaluation.metrics import Measures, Statistics

ENDINGS = (".npz", ".pkl")
AGAIN = "write it again with training.reference"
LARGEST = 1e12  # of the numbers in statistics, whose squares are summed
ROUNDING = 1e-3  # of a covariance in float32, relative to its largest entry


class ReferenceFile(NamedTuple):
    """What a file holds of a reference; None for what it lacks.

    Attributes:
        images: uint8 (N, 3, H, W).
        statistics: of the features.
        spatial: of the spatial features.
        measures: features and saturations of some images; their probabilities are not kept.
        fingerprint: of the network that the features are of.
    """

    images: Tensor | None = None
    statistics: Statistics | None = None
    spatial: Statistics | None = None
    measures: Measures | None = None
    fingerprint: str | None = None


def read_reference(path: str | Path, option: str = "reference") -> ReferenceFile:
    """Read an .npz file, ADM's, EDM's or one of `training.reference`, or StyleGAN's .pkl.

    ADM's VIRTUAL_imagenet256_labeled.npz has statistics of the whole training set, and some of its
    images. Of a pickle nothing is run, see `read_statistics_pickle`.

    Args:
        path: of the file.
        option: that it comes from, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it holds neither images as `arr_0` (N, H, W, 3), uint8, nor statistics as `mu`
            and `sigma`; or Python objects, which are never unpickled.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {printable(str(path))} (--{option})")
    if path.suffix == ".pkl":
        return ReferenceFile(statistics=checked_statistics(*read_statistics_pickle(path), path))
    names = ("arr_0", "mu", "sigma", "mu_s", "sigma_s", "features", "saturation")
    arrays, found = read_npz(path, (*names, "features_sha256"))
    images, mean, covariance, *spatial = (arrays.get(name) for name in names[:5])
    if images is not None:
        check_images_array(images.dtype, images.shape, path)
    if (mean is None) != (covariance is None) or (mean is None and images is None):
        wanted = "it needs images as arr_0, or statistics as mu and sigma, or all three"
        raise FileError(path, f"holds {quoted(found)}", wanted)
    given = None if mean is None else checked_statistics(mean, covariance, path)
    both = given is not None and all(each is not None for each in spatial)
    return ReferenceFile(
        None if images is None else torch.from_numpy(images).permute(0, 3, 1, 2),
        given,
        checked_statistics(*spatial, path, "mu_s and sigma_s") if both else None,
        None if given is None else _measures(arrays, len(given.mean), path),
        _fingerprint(arrays.get("features_sha256"), path),
    )


def check_images_array(dtype: np.dtype, shape: tuple[int, ...], path: Path) -> None:
    """Check that an array of this type and shape is one of RGB images.

    Raises:
        FileError: it is not.
    """
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        found = f"has arr_0 in {dtype} {tuple(shape)}"
        raise FileError(path, found, "it must be uint8 images (N, H, W, 3)")
    if 0 in shape:
        raise FileError(path, f"has no pixels: arr_0 is {tuple(shape)}", "give images")


def checked_statistics(
    mean: np.ndarray, covariance: np.ndarray, path: Path, names: str = "mu and sigma"
) -> Statistics:
    """Return statistics in float64.

    Raises:
        FileError: shapes do not fit each other, numbers are not finite or too large, or the second
            array is no covariance.
    """
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        found = f"has {names} of shapes {mean.shape} and {covariance.shape}, which do not fit"
        raise FileError(path, found, "they must be (D,) and (D, D)")
    if not (len(mean) and np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise FileError(path, f"has no numbers, NaN or infinity in {names}")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    largest = max(np.abs(mean).max(), np.abs(covariance).max())
    if largest > LARGEST:
        found = f"has the number {largest:.3g} in {names}"
        raise FileError(path, found, f"those of features are below {LARGEST:.0e}")
    slack = ROUNDING * np.abs(covariance).max()
    uneven = np.abs(covariance - covariance.T).max() > slack
    if uneven or np.linalg.eigvalsh(covariance).min() < -slack:
        kind = "symmetric" if uneven else "positive (it has negative variances)"
        raise FileError(path, f"has no covariance in {names}: it is not {kind}")
    return Statistics(mean, covariance)


def _measures(arrays: dict[str, np.ndarray], dimensions: int, path: Path) -> Measures | None:
    """Return the measures of single images that a file holds.

    Raises:
        FileError: they do not fit the statistics or each other.
    """
    features, saturation = arrays.get("features"), arrays.get("saturation")
    if features is None or saturation is None:
        return None
    fits = features.shape[1:] == (dimensions,) and saturation.shape == features.shape[:1]
    if not fits or features.dtype.kind != "f" or saturation.dtype.kind != "f" or not features.size:
        found = f"has features {features.shape} and saturation {saturation.shape}"
        raise FileError(path, f"{found} for {dimensions} dimensions", AGAIN)
    values = [torch.from_numpy(values.astype(np.float32)) for values in (features, saturation)]
    if not all(value.isfinite().all() for value in values):
        raise FileError(path, "has NaN or infinity in its features or saturation", AGAIN)
    return Measures(values[0], torch.empty(len(features), 0), values[1].clamp(0, 1))


def _fingerprint(digest: np.ndarray | None, path: Path) -> str | None:
    """Return the SHA-256 of the feature network in hexadecimal digits, if there is one.

    Raises:
        FileError: it is none.
    """
    if digest is not None and (digest.dtype != np.uint8 or digest.shape != (32,)):
        found = f"has features_sha256 in {digest.dtype} {digest.shape}"
        raise FileError(path, found, AGAIN)
    return None if digest is None else digest.tobytes().hex()


def is_own_reference(path: Path) -> bool:
    """Return whether a file is one that `write_reference` wrote.

    Raises:
        FileError: it is damaged, or no .npz file.
    """
    return "features_sha256" in read_npz(path, ("features_sha256",))[1]


def read_made_from(path: Path) -> dict[str, Any] | None:
    """Return what tells a reference from others, as given to `write_reference`.

    Returns:
        None for a file of a version that did not write it.

    Raises:
        FileError: the file is damaged.
    """
    found = read_npz(path, ("made_from",))[0].get("made_from")
    if found is None:
        return None
    if found.dtype != np.uint8 or found.ndim != 1:
        raise FileError(path, f"has made_from in {found.dtype} {found.shape}", AGAIN)
    return json_object(found.tobytes().decode("utf-8", "replace"), path, "made_from", AGAIN)


def write_reference(
    path: Path,
    statistics: Statistics,
    spatial: Statistics,
    measures: Measures | None,
    fingerprint: str,
    made_from: dict[str, Any],
) -> None:
    """Write a reference's file, atomically; for the names of its arrays see this file's top."""
    arrays = {
        "mu": statistics.mean,
        "sigma": statistics.covariance,
        "mu_s": spatial.mean,
        "sigma_s": spatial.covariance,
        "features_sha256": np.frombuffer(bytes.fromhex(fingerprint), np.uint8),
        "made_from": np.frombuffer(json.dumps(made_from).encode(), np.uint8),
    }
    if measures is not None:
        arrays["features"] = measures.features.numpy()
        arrays["saturation"] = measures.saturation.float().numpy()
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
