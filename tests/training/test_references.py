"""References of an evaluation: .npz files, folders of images, prepared folders."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.evaluation_runs import arguments, run, two_classes, write_place, write_prepared
from training.evaluate import parse
from training.evaluation.classifier import ClassifierFeatures
from training.evaluation.evaluation import Evaluation
from training.evaluation.metrics import statistics
from training.evaluation.real_images import read_npz


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with training and test data, a model, and trained features."""
    return write_place(tmp_path_factory.mktemp("evaluate"))


def test_npz_references(tmp_path):
    images = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    np.savez(
        tmp_path / "adm.npz",
        arr_0=images,
        mu=np.zeros(3, np.float32),
        sigma=np.eye(3),
        mu_s=np.zeros(7),
    )
    found, given = read_npz(tmp_path / "adm.npz")
    assert torch.equal(found, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert given.mean.dtype == given.covariance.dtype == np.float64
    np.savez(tmp_path / "plain.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert read_npz(tmp_path / "plain.npz")[0] is None
    bad = {
        "adm.npz is not a whole": None,
        "it must be uint8": {"arr_0": images[0]},
        "it needs images": {"mu": np.zeros(3)},
        "do not fit": {"mu": np.zeros(3), "sigma": np.eye(2)},
        "plain arrays": {"arr_0": np.array([{}], dtype=object)},
    }
    for message, arrays in bad.items():
        path = tmp_path / ("bad.npz" if arrays else "adm.npz")
        if arrays:
            np.savez(path, **arrays)
        else:
            path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(ValueError, match=message):
            read_npz(path)


def test_another_reference_of_the_same_name_is_another(place, tmp_path):
    figures = []
    for seed in (0, 1):
        write_prepared(tmp_path / str(seed) / "reference", *two_classes(100, seed=seed))
        reference = str(tmp_path / str(seed) / "reference")
        figures.append(
            run(place, tmp_path / "out", "--reference", reference)["results"][0]["frechet_distance"]
        )
    assert figures[0] != figures[1]


def test_a_model_and_a_reference_are_enough(place, tmp_path):
    expected = run(place, tmp_path / "with")["results"][0]["frechet_distance"]
    given = arguments(place, tmp_path / "without", "--reference", str(place / "train"))
    at = given.index("--data")
    report = Evaluation(parse(given[:at] + given[at + 2 :])).run()
    assert report["results"][0]["frechet_distance"] == pytest.approx(expected, rel=1e-4)


def test_references(place, tmp_path):
    """Images in a folder and in an .npz file give the figures of their prepared folder."""

    images = two_classes(200)[0].permute(0, 2, 3, 1).numpy()
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{number}.png")
    np.savez(tmp_path / "images.npz", arr_0=images)
    found = statistics(
        ClassifierFeatures.load(place / "f.safetensors").extract(two_classes(200)[0])["features"]
    )
    np.savez(tmp_path / "statistics.npz", mu=found.mean, sigma=found.covariance)
    expected = run(place, tmp_path / "out")["results"][0]
    for name in ("folder", "images.npz", "statistics.npz"):
        row = run(place, tmp_path / "out", "--reference", str(tmp_path / name))["results"][0]
        assert row["frechet_distance"] == pytest.approx(expected["frechet_distance"], rel=1e-4)
        assert row["precision"] == (None if name == "statistics.npz" else expected["precision"])
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="mu has 3 features, but f has 64"):
        run(place, tmp_path / "out", "--reference", str(tmp_path / "wrong.npz"))
