"""How good samples are: Fréchet distance, inception score, precision and recall, class accuracy, saturation.

`measure` turns images into `Measures`, `Reference` is what they are compared with, and `score` gives the figures. The first
four are torch-fidelity's to the last digits that count (the tests compare them); they are computed here because small models
should be evaluated without it and the torchvision that it imports, and because a sweep needs the reference's share of precision
and recall only once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.evaluation.extractors import Extractor
from training.evaluation.saturation import image_saturation

NEIGHBOURS = 3  # k of precision and recall
BINS = 20  # of saturation histograms over [0, 1]
SPLITS, MIN_SPLIT = (
    10,
    100,
)  # of the inception score; fewer, larger ones below SPLITS * MIN_SPLIT images
DISTANCES = 2**27  # so many distances are in memory at a time


class Statistics(NamedTuple):
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclasses.dataclass(frozen=True)
class Measures:
    """What is measured on each of N images.

    Attributes:
        features: (N, D) float32.
        probabilities: (N, classes) float32.
        saturation: (N,) in [0, 1].
        labels: (N,) int64, the classes that the images should be of; None if nobody knows.
    """

    features: Tensor
    probabilities: Tensor
    saturation: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def cat(cls, parts: Iterable[Measures]) -> Measures:
        """All the images of `parts`."""
        columns = zip(
            *((p.features, p.probabilities, p.saturation, p.labels) for p in parts), strict=True
        )
        return cls(
            *(None if any(t is None for t in column) else torch.cat(column) for column in columns)
        )


@dataclasses.dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        statistics: of its features.
        measures: of its images; None if it has no images, and then neither precision nor recall.
        limit: precision and recall use so many of its images, the first ones; usually as many as there are samples. With more,
            neighbours come nearer and precision falls, to nothing where the images are copies of fewer in other colours.
    """

    statistics: Statistics
    measures: Measures | None = None
    limit: int | None = None

    @property
    def neighbours(self) -> Tensor:
        """The features (n, D) that precision and recall use."""
        return self.measures.features[: self.limit]

    @cached_property
    def radii(self) -> Tensor:
        """(n,) of them, see `neighbour_radii`."""
        return neighbour_radii(self.neighbours)


def measure(
    images: Tensor, extractor: Extractor, labels: Tensor | None = None, batch: int = 100
) -> Measures:
    """Everything that is measured on each of the images, uint8 (N, 3, H, W)."""
    parts = [extractor.extract(part) for part in images.split(batch)]
    features, probabilities = (
        torch.cat([part[name] for part in parts]) for name in ("features", "probabilities")
    )
    return Measures(features, probabilities, image_saturation(images).cpu(), labels)


def statistics(features: Tensor) -> Statistics:
    """Mean and covariance of features (N, D).

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


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared 2-Wasserstein distance of two Gaussians; of Inception's features it is the FID (Heusel et al. 2017).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    Raises:
        ValueError: they are of different numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared; the reference must be of the same "
            "features as the samples (--features, --reference)"
        )
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(min=0)).sum()
    distance = (
        np.square(a.mean - b.mean).sum()
        + np.trace(a.covariance)
        + np.trace(b.covariance)
        - 2 * cross
    )
    return max(0.0, float(distance))


def inception_score(probabilities: Tensor) -> float:
    """exp E KL(p(class | image) || p(class)) (Salimans et al. 2016), mean of 10 splits; of fewer if there would be under 100
    images in one."""
    splits = max(1, min(SPLITS, len(probabilities) // MIN_SPLIT))
    scores = []
    for p in probabilities.double().tensor_split(splits):
        scores.append(torch.special.xlogy(p, p / p.mean(0).clamp(min=1e-300)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def precision_recall(
    samples: Tensor, reference: Tensor, radii: Tensor | None = None
) -> tuple[float, float]:
    """Precision and recall (Kynkäänniemi et al. 2019), k = 3: the share of samples within the k-nearest-neighbour ball of
    some reference image, and the reverse.

    Args:
        samples, reference: features (N, D) and (M, D).
        radii: of the reference, if they are known, see `neighbour_radii`.

    Raises:
        ValueError: one of the sets has no more than 3 images.
    """
    radii = neighbour_radii(reference) if radii is None else radii
    return share_inside(samples, reference, radii), share_inside(
        reference, samples, neighbour_radii(samples)
    )


def neighbour_radii(features: Tensor) -> Tensor:
    """The distance (N,) of each of the features (N, D) to its third-nearest other one.

    Raises:
        ValueError: there are no more than 3.
    """
    if len(features) <= NEIGHBOURS:
        raise ValueError(
            f"precision and recall need more than {NEIGHBOURS} images on either side, not {len(features)} (--count, "
            "--reference)"
        )
    return torch.cat(
        [d.kthvalue(NEIGHBOURS + 1).values for d in _distances(features, features)]
    )  # the nearest is itself


def share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """The share of points (N, D) that are inside some ball: centres (M, D), radii (M,)."""
    return (
        torch.cat([(d <= radii).any(1) for d in _distances(points, centres)]).double().mean().item()
    )


def nearest_distance(samples: Tensor, reference: Tensor) -> float:
    """The mean distance of samples (N, D) to the nearest of the features (M, D): of a model that has learnt images by
    heart it lies well below that of images that it was not trained on."""
    return torch.cat([d.amin(1) for d in _distances(samples, reference)]).double().mean().item()


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Rows of the (N, M) distances, as many at a time as fit the memory; where there is a GPU, it computes them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    b = b.to(device)
    for part in a.split(max(1, DISTANCES // len(b))):
        yield torch.cdist(part.to(device), b)


def class_accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """The share of images whose most probable class is their label."""
    return (probabilities.argmax(1) == labels).double().mean().item()


def histogram_distance(a: Tensor, b: Tensor, bins: int = BINS) -> float:
    """Total variation distance, in [0, 1], between the histograms of two sets of values in [0, 1]."""
    first, second = (torch.histc(v.double().clamp(0, 1), bins, 0, 1) / len(v) for v in (a, b))
    return 0.5 * (first - second).abs().sum().item()


def score(
    measures: Measures, reference: Reference, *, classes: tuple[str, ...] | None = None, known=None
) -> dict[str, Any]:
    """The figures of samples.

    Args:
        classes: the extractor's, None if they are not those of the labels; then there is no class accuracy.
        known: a function that gives the distance of saturations (N,) to a known distribution; without, they are compared with
            the reference images'.

    Returns:
        `frechet_distance` (the FID, where the features are Inception's), `inception_score`, `precision`, `recall`,
        `nearest_distance` (see there), `class_accuracy`, `saturation` (mean), `saturation_distance` (total variation of 20-bin
        histograms); None for what cannot be known.
    """
    images = reference.measures
    precision = recall = nearest = accuracy = distance = None
    if images is not None:
        nearest = nearest_distance(measures.features, images.features)
        precision, recall = precision_recall(
            measures.features, reference.neighbours, reference.radii
        )
    if measures.labels is not None and classes is not None:
        accuracy = class_accuracy(measures.probabilities, measures.labels)
    if known is not None:
        distance = known(measures.saturation)
    elif images is not None:
        distance = histogram_distance(measures.saturation, images.saturation)
    return {
        "frechet_distance": frechet_distance(statistics(measures.features), reference.statistics),
        "inception_score": inception_score(measures.probabilities),
        "precision": precision,
        "recall": recall,
        "nearest_distance": nearest,
        "class_accuracy": accuracy,
        "saturation": measures.saturation.double().mean().item(),
        "saturation_distance": distance,
    }
