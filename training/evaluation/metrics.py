"""Measure samples: Fréchet distances, inception score, precision, recall, accuracy, saturation.

`measure` turns images into `Measures`, `Reference` is what they are compared with, and `score`
returns the figures. FID, inception score, precision and recall equal torch-fidelity's, the
inception score that of as many splits; a test compares them where torch-fidelity is installed
(pip install -e '.[inception]'), and is skipped elsewhere. They are computed here so that small
models can be evaluated without torch-fidelity and torchvision, and so that a sweep computes the
reference's part of precision and recall only once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.evaluation.config import NEIGHBOURS
from training.evaluation.extractors import Extractor
from training.evaluation.saturation import image_saturation

BINS = 20  # of saturation histograms over [0, 1]
SPLITS = 10  # of the inception score
MIN_SPLIT = 100  # images per split; with fewer images there are fewer splits
SHUFFLE_SEED = 2020  # torch-fidelity's
DISTANCES = 2**27  # distances in memory at a time


class Statistics(NamedTuple):
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclasses.dataclass(frozen=True)
class Measures:
    """Measurements on each of N images.

    Attributes:
        features: (N, D) float32.
        probabilities: (N, classes) float32.
        saturation: (N,) in [0, 1].
        labels: (N,) int64, the classes that the images should have; None if unknown.
        spatial: (N, S) float32, spatial features; None if unknown.
    """

    features: Tensor
    probabilities: Tensor
    saturation: Tensor
    labels: Tensor | None = None
    spatial: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def cat(cls, parts: Iterable[Measures]) -> Measures:
        """Concatenate the measures of several sets of images."""
        names = [field.name for field in dataclasses.fields(cls)]
        columns = zip(*([getattr(part, name) for name in names] for part in parts), strict=True)
        return cls(
            *(None if any(t is None for t in column) else torch.cat(column) for column in columns)
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that are not None, to write to a file."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}


@dataclasses.dataclass(frozen=True)
class Reference:
    """A set of real images that samples are compared with.

    Attributes:
        statistics: of the features.
        spatial: of the spatial features; None if unknown.
        measures: of the images; None if there are only statistics, and then neither precision nor
            recall.
        limit: number of images, the first ones, that precision and recall use; usually the number
            of samples. With more, neighbours are nearer and precision is lower: it vanishes where
            the images are recoloured copies of fewer ones.
        device: device that computes the distances between features.
    """

    statistics: Statistics
    measures: Measures | None = None
    limit: int | None = None
    device: str | torch.device = "cpu"
    spatial: Statistics | None = None

    @cached_property
    def neighbours(self) -> Tensor:
        """Features (n, D) that precision and recall use, on `device`."""
        return self.measures.features[: self.limit].to(self.device)

    @cached_property
    def radii(self) -> Tensor:
        """Radii (n,) of the neighbours, see `neighbour_radii`."""
        return neighbour_radii(self.neighbours)


def measure(
    images: Tensor, extractor: Extractor, labels: Tensor | None = None, batch: int = 100
) -> Measures:
    """Measure each image.

    Args:
        images: uint8 (N, 3, H, W).
        labels: (N,) the classes that they should have.
        batch: images that the extractor takes at a time.
    """
    parts = [extractor.extract(part) for part in images.split(batch)]
    features, probabilities, spatial = (
        torch.cat([part[name] for part in parts])
        for name in ("features", "probabilities", "spatial")
    )
    return Measures(features, probabilities, image_saturation(images).cpu(), labels, spatial)


def statistics(features: Tensor) -> Statistics:
    """Return mean and covariance of features (N, D).

    Raises:
        ValueError: there are fewer than 2, or some are not finite.
    """
    if len(features) < 2:
        raise ValueError(
            f"{len(features)} images have no covariance; at least 2 are needed (--count)"
        )
    if not features.isfinite().all():
        raise ValueError(
            "some features are not finite; look at the samples, the model may have diverged"
        )
    x = features.double().numpy()
    return Statistics(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))


class Sums:
    """Sums over features, from which their mean and covariance follow; all in float64."""

    def __init__(self):
        self.count, self.sum, self.products = 0, 0.0, 0.0

    def add(self, features: Tensor) -> None:
        """Add features (N, D).

        Raises:
            ValueError: some are not finite.
        """
        if not features.isfinite().all():
            raise ValueError("some features are not finite; look at the images")
        x = features.double().numpy()
        self.count += len(x)
        self.sum = self.sum + x.sum(0)
        self.products = self.products + x.T @ x

    def merge(self, other: Sums) -> None:
        """Add the features of other sums."""
        self.count += other.count
        self.sum = self.sum + other.sum
        self.products = self.products + other.products

    def statistics(self) -> Statistics:
        """Return mean and covariance.

        Raises:
            ValueError: there are fewer than 2 features.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} images have no covariance; at least 2 are needed")
        mean = self.sum / self.count
        scatter = self.products - self.count * np.outer(mean, mean)
        return Statistics(mean, scatter / (self.count - 1))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Return the squared 2-Wasserstein distance of two Gaussians.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2); with Inception's features this is the
    FID (Heusel et al. 2017).

    Raises:
        ValueError: they have different numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared; the "
            "reference must have the same features as the samples (--features, --reference)"
        )
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(min=0)).sum()
    means = np.square(a.mean - b.mean).sum()
    distance = means + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(0.0, float(distance))


def inception_score(probabilities: Tensor) -> float:
    """Return exp E KL(p(class | image) || p(class)) (Salimans et al. 2016), averaged over splits.

    There are 10 splits, or fewer if they would have under 100 images each. The images are put in
    the random order of torch-fidelity first: a folder sorted by class has one class in each split
    otherwise, and a score near 1.

    Args:
        probabilities: (N, classes).
    """
    count = len(probabilities)
    splits = max(1, min(SPLITS, count // MIN_SPLIT))
    bounds = [number * count // splits for number in range(1, splits)]
    order = torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(count))
    scores = []
    for p in probabilities[order].double().tensor_split(bounds):
        scores.append(torch.special.xlogy(p, p / p.mean(0).clamp(min=1e-300)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def precision_recall(
    samples: Tensor, reference: Tensor, radii: Tensor | None = None
) -> tuple[float, float]:
    """Return precision and recall (Kynkäänniemi et al. 2019) with k = 3.

    Precision is the share of samples within the k-nearest-neighbour ball of some reference image;
    recall is the share of reference images within such a ball of some sample.

    Args:
        samples, reference: features (N, D) and (M, D).
        radii: `neighbour_radii` of the reference, if already known.

    Raises:
        ValueError: one of the sets has no more than 3 images.
    """
    radii = neighbour_radii(reference) if radii is None else radii
    precision = share_inside(samples, reference, radii)
    return precision, share_inside(reference, samples, neighbour_radii(samples))


def neighbour_radii(features: Tensor) -> Tensor:
    """Return the distance (N,) of each of the features (N, D) to its third-nearest other one.

    Raises:
        ValueError: there are no more than 3.
    """
    if len(features) <= NEIGHBOURS:
        raise ValueError(
            f"precision and recall need more than {NEIGHBOURS} images on either side, not "
            f"{len(features)} (--count, --reference)"
        )
    rank = NEIGHBOURS + 1  # the nearest is the point itself
    return torch.cat([d.kthvalue(rank).values for d in pairwise_distances(features, features)])


def share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Return the share of points (N, D) inside some ball: centres (M, D), radii (M,)."""
    inside = [(d <= radii).any(1) for d in pairwise_distances(points, centres)]
    return torch.cat(inside).double().mean().item()


def nearest_distance(samples: Tensor, reference: Tensor) -> float:
    """Return the mean distance of samples (N, D) to the nearest reference features (M, D).

    If a model has memorised images, it is well below the distance of images that the model was
    not trained on.
    """
    nearest = [d.amin(1) for d in pairwise_distances(samples, reference)]
    return torch.cat(nearest).double().mean().item()


def pairwise_distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Yield the distances (N, M) of a (N, D) to b (M, D) in blocks of rows that fit the memory."""
    for part in a.split(max(1, DISTANCES // len(b))):
        yield torch.cdist(part, b)


def class_accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Return the share of images whose most probable class is their label."""
    return (probabilities.argmax(1) == labels).double().mean().item()


def histogram_distance(a: Tensor, b: Tensor, bins: int = BINS) -> float:
    """Return the total variation distance, in [0, 1], of two histograms of values in [0, 1].

    Args:
        a, b: (n,) and (m,).
    """
    first, second = (torch.histc(v.double().clamp(0, 1), bins, 0, 1) / len(v) for v in (a, b))
    return 0.5 * (first - second).abs().sum().item()


def score(
    measures: Measures,
    reference: Reference,
    *,
    classes: tuple[str, ...] | None = None,
    known: Callable[[Tensor], float] | None = None,
) -> dict[str, Any]:
    """Compute all figures of a set of samples.

    Args:
        measures: of the samples.
        reference: what they are compared with.
        classes: the extractor's; None if the labels are of other classes, and then there is no
            class accuracy.
        known: distance of saturations (N,) to a known distribution; None compares them with those
            of the reference images.

    Returns:
        `frechet_distance` and `spatial_frechet_distance` (FID and sFID, if the features are
        Inception's), `inception_score`, `precision`, `recall`, `nearest_distance`,
        `class_accuracy`, `saturation` (mean), and `saturation_distance` (total variation of 20-bin
        histograms); None where unknown.
    """
    images = reference.measures
    precision = recall = nearest = accuracy = distance = spatial = None
    if measures.spatial is not None and reference.spatial is not None:
        spatial = frechet_distance(statistics(measures.spatial), reference.spatial)
    if images is not None:
        features = measures.features.to(reference.device)
        nearest = nearest_distance(features, images.features.to(reference.device))
        precision, recall = precision_recall(features, reference.neighbours, reference.radii)
    if measures.labels is not None and classes is not None:
        accuracy = class_accuracy(measures.probabilities, measures.labels)
    if known is not None:
        distance = known(measures.saturation)
    elif images is not None:
        distance = histogram_distance(measures.saturation, images.saturation)
    return {
        "frechet_distance": frechet_distance(statistics(measures.features), reference.statistics),
        "spatial_frechet_distance": spatial,
        "inception_score": inception_score(measures.probabilities),
        "precision": precision,
        "recall": recall,
        "nearest_distance": nearest,
        "class_accuracy": accuracy,
        "saturation": measures.saturation.double().mean().item(),
        "saturation_distance": distance,
    }
