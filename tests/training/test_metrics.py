"""Figures of an evaluation, against closed forms and against torch-fidelity."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.evaluation_runs import torch_fidelity, two_classes, write_place
from training.common.devices import cuda_or_cpu
from training.evaluation.classifier import ClassifierFeatures
from training.evaluation.metrics import (
    Measures,
    Reference,
    Statistics,
    frechet_distance,
    histogram_distance,
    inception_score,
    measure,
    nearest_distance,
    neighbour_radii,
    precision_recall,
    score,
    share_inside,
    statistics,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with training and test data, a model, and trained features."""
    return write_place(tmp_path_factory.mktemp("evaluate"))


def test_frechet_distance_of_gaussians():
    """It is |mean_a - mean_b|^2 + sum (sd_a - sd_b)^2 for diagonal ones, in any common basis."""
    turn = torch.linalg.qr(
        torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )[0].numpy()
    means, deviations = (
        np.array([[0.0, 1, 2, 3], [1.0, 1, 0, 3]]),
        np.array([[1.0, 2, 0.5, 3], [2.0, 2, 1, 1]]),
    )
    a, b = (
        Statistics(turn @ m, turn @ np.diag(s**2) @ turn.T)
        for m, s in zip(means, deviations, strict=True)
    )
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 0.25 + 4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="4 and of 2 features"):
        frechet_distance(a, Statistics(np.zeros(2), np.eye(2)))
    with pytest.raises(ValueError, match="at least 2"):
        statistics(torch.zeros(1, 4))


def test_precision_and_recall():
    wide = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    assert precision_recall(wide, wide) == (1, 1)
    assert precision_recall(wide, wide + 100) == (0, 0)
    precision, recall = precision_recall(0.05 * wide, wide)  # samples without variety
    assert precision > 0.9 > 0.3 > recall
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(wide[:3], wide)


def test_radii_reach_the_third_nearest_other_point():
    """Points 0, 1, 3, 6, 10 on a line; balls include their border."""
    line = torch.tensor([0.0, 1, 3, 6, 10]).unsqueeze(1)
    radii = neighbour_radii(line)
    assert radii.tolist() == [6, 5, 3, 5, 9]
    points = torch.tensor([-6.0, -6.1, 19, 19.1]).unsqueeze(1)
    assert share_inside(points, line, radii) == 0.5
    # Precision: two of the points are inside. Recall: their balls reach all of the line.
    assert precision_recall(points, line) == (0.5, 1)
    assert neighbour_radii(points).tolist() == pytest.approx([25.1, 25.2, 25.1, 25.2])


def test_nearest_distance():
    reference = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    assert nearest_distance(
        torch.tensor([[0.0, 3.0], [10.0, 4.0], [4.0, 0.0]]), reference
    ) == pytest.approx(11 / 3)


def test_cpu_as_the_device_keeps_the_distances_off_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (cuda_or_cpu("cpu").type, cuda_or_cpu("auto").type) == ("cpu", "cuda")
    points = torch.eye(5)
    measures = Measures(points, torch.full((5, 2), 0.5), torch.zeros(5))
    reference = Reference(statistics(points), measures, device=cuda_or_cpu("cpu"))
    assert score(measures, reference)["precision"] == 1


def test_inception_score():
    """It is the number of classes if each image is sure of its class, and 1 if all are alike."""
    assert inception_score(torch.eye(5).repeat(40, 1)) == pytest.approx(5, rel=0.02)
    assert inception_score(torch.full((200, 5), 0.2)) == pytest.approx(1)


def test_inception_score_does_not_depend_on_the_order_of_classes():
    """A folder that is sorted by class has one class in each split if it is not shuffled."""
    images = torch.eye(10).repeat_interleave(200, 0)
    assert inception_score(images) == pytest.approx(10, rel=0.03)
    assert inception_score(images[torch.arange(2000).reshape(10, 200).T.flatten()]) == (
        pytest.approx(inception_score(images), rel=0.01)
    )


def test_figures_are_those_of_torch_fidelity():
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(310, 16, generator=generator) @ torch.randn(16, 16, generator=generator),
        torch.randn(400, 16),
    )
    fid, isc, prc = (torch_fidelity(f"metric_{name}") for name in ("fid", "isc", "prc"))
    expected = fid.fid_statistics_to_metric(
        *map(fid.fid_features_to_statistics, (a.double(), b.double())), verbose=False
    )
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(*expected.values())
    expected = isc.isc_features_to_metric(a, splits=3)["inception_score_mean"]
    assert inception_score(a.softmax(1)) == pytest.approx(expected, rel=1e-5)
    expected = prc.prc_features_to_metric(
        a, 2 * b, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=True, verbose=False
    )
    assert precision_recall(a, 2 * b) == pytest.approx((expected["precision"], expected["recall"]))


def test_saturation_and_accuracy(place):
    grey, red = (
        torch.full((10, 3, 8, 8), 100, dtype=torch.uint8),
        torch.zeros(10, 3, 8, 8, dtype=torch.uint8),
    )
    red[:, 0] = 200
    features = ClassifierFeatures.load(place / "f.safetensors")
    both = measure(torch.cat([grey, red]), features, torch.zeros(20, dtype=torch.int64))
    assert both.saturation.tolist() == [0] * 10 + [1] * 10
    reference = Reference(statistics(both.features), measure(red, features))
    found = score(both, reference, classes=features.classes)
    assert found["saturation"] == 0.5
    assert found["saturation_distance"] == 0.5
    assert found["class_accuracy"] == (both.probabilities.argmax(1) == 0).double().mean().item()
    assert len(Reference(reference.statistics, both, limit=7).radii) == 7
    found = score(
        both,
        Reference(reference.statistics),
        classes=None,
        known=lambda values: values.sum().item(),
    )
    assert (
        found["precision"]
        is found["recall"]
        is found["class_accuracy"]
        is found["nearest_distance"]
        is None
    )
    assert found["saturation_distance"] == 10
    assert histogram_distance(torch.zeros(3), torch.tensor([0.01, 0.04, 1.0])) == pytest.approx(
        1 / 3
    )


def test_spatial_distance(place):
    """It is that of 7 channels of the last map, and tells where things are."""
    features = ClassifierFeatures.load(place / "f.safetensors")
    images = two_classes(60, seed=1)[0]
    here, there = (measure(x, features) for x in (images, images.roll(2, dims=2)))
    maps = features.network.maps(images[:3])[:, :7]
    assert here.spatial.shape == (60, features.facts["spatial_dimensions"]) == (60, 7 * 4 * 4)
    assert torch.equal(here.spatial[:3].reshape(3, 4, 4, 7).permute(0, 3, 1, 2), maps)
    known = [statistics(x) for x in (here.features, here.spatial)]
    reference = Reference(known[0], here, spatial=known[1])
    assert score(here, reference)["spatial_frechet_distance"] == pytest.approx(0, abs=1e-6)
    found = score(there, reference)["spatial_frechet_distance"]
    assert found == pytest.approx(frechet_distance(statistics(there.spatial), known[1]))
    assert found > 0.01
    assert score(here, Reference(known[0], here))["spatial_frechet_distance"] is None


def test_measures_without_labels_have_none():
    one = Measures(torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2))
    assert Measures.cat([one, one]).labels is None
    assert len(Measures.cat([one, one])) == 4
