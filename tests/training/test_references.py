"""References of an evaluation: .npz files, folders of images, prepared folders."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.evaluation_runs import arguments, run, two_classes, write_place, write_prepared
from training import reference
from training.evaluate import parse
from training.evaluation.classifier import ClassifierFeatures
from training.evaluation.evaluation import Evaluation
from training.evaluation.metrics import statistics
from training.evaluation.reference_file import read_reference
from training.evaluation.report import METRICS, NEWER


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
    found, given, *_ = read_reference(tmp_path / "adm.npz")
    assert torch.equal(found, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert given.mean.dtype == given.covariance.dtype == np.float64
    np.savez(tmp_path / "plain.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert read_reference(tmp_path / "plain.npz").images is None
    bad = {
        "adm.npz is not a whole": None,
        "it must be uint8": {"arr_0": images[0]},
        "it needs images": {"mu": np.zeros(3)},
        "do not fit": {"mu": np.zeros(3), "sigma": np.eye(2)},
        "plain arrays": {"arr_0": np.array([{}], dtype=object)},
        "it is not symmetric": {"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0, 1]])},
        "it has negative variances": {"mu": np.zeros(2), "sigma": -np.eye(2)},
        r"has the number 1e\+300 in": {"mu": np.zeros(2), "sigma": 1e300 * np.eye(2)},
    }
    for message, arrays in bad.items():
        path = tmp_path / ("bad.npz" if arrays else "adm.npz")
        if arrays:
            np.savez(path, **arrays)
        else:
            path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(ValueError, match=message):
            read_reference(path)


def test_another_reference_of_the_same_name_is_another(place, tmp_path):
    figures = []
    for seed in (0, 1):
        write_prepared(tmp_path / str(seed) / "reference", *two_classes(100, seed=seed))
        folder = str(tmp_path / str(seed) / "reference")
        figures.append(
            run(place, tmp_path / "out", "--reference", folder)["results"][0]["frechet_distance"]
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


def test_statistics_of_any_data_are_written_and_read_back(place, tmp_path):
    """Of a prepared folder and of an .npz; the figures are those of the images themselves."""
    images = two_classes(200)[0].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "images.npz", arr_0=images)
    features = ["--features", str(place / "f.safetensors"), "--device", "cpu"]
    expected = run(place, tmp_path / "out")["results"][0]
    for data in (place / "train", tmp_path / "images.npz"):
        written = tmp_path / f"of_{data.name}.npz"
        parts = ["--chunk-size", "60", *features, "--out", str(written)]
        reference.main(["--data", str(data), *parts])
        assert not written.with_name(f"{written.name}.parts").exists()
        row = run(place, tmp_path / "out", "--reference", str(written))["results"][0]
        for metric in (*METRICS, *NEWER):
            assert row[metric] == pytest.approx(expected[metric], rel=1e-4), (data, metric)
    with np.load(written, allow_pickle=False) as file:
        arrays = dict(file)
    assert (arrays["mu"].shape, arrays["sigma"].shape) == ((64,), (64, 64))
    assert arrays["sigma_s"].shape == (112, 112)
    assert arrays["features"].shape == (200, 64)
    few = ["--keep", "0", "--count", "20", "--out", str(tmp_path / "few.npz")]
    reference.main(["--data", str(place / "train"), *features, *few])
    assert read_reference(tmp_path / "few.npz").measures is None
    np.savez(tmp_path / "of_others.npz", **{**arrays, "features_sha256": np.zeros(32, np.uint8)})
    np.savez(tmp_path / "damaged.npz", **{**arrays, "saturation": np.zeros(3)})
    for name, message in (
        ("of_others", "measured with other features than f has now"),
        ("damaged", r"has features \(200, 64\) and saturation \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            run(place, tmp_path / "out", "--reference", str(tmp_path / f"{name}.npz"))
    np.savez(tmp_path / "plain.npz", mu=np.zeros(3), sigma=np.eye(3))
    (tmp_path / "image.png").write_bytes(b"")
    for name, message in (
        ("plain.npz", r"plain\.npz holds no images, only statistics"),
        ("image.png", r"image\.png is no \.npz or \.pkl file; give --data an \.npz"),
        ("absent", r"there is no \S*absent; give --data an \.npz"),
    ):
        with pytest.raises(SystemExit, match=message):
            reference.main(["--data", str(tmp_path / name), *features])


def test_a_finished_reference_is_kept_unless_it_is_to_be_replaced(place, tmp_path, capsys):
    out = tmp_path / "r.npz"
    same = ["--data", str(place / "train"), "--features", str(place / "f.safetensors")]
    same += ["--device", "cpu", "--count", "30", "--out", str(out)]
    reference.main(same)
    written = out.read_bytes()
    reference.main(same)
    assert f"{out} is there already, of these images and features" in capsys.readouterr().out
    for more, said in (
        (["--count", "40"], r"of other images \(--data, --size, --count\); .*--replace"),
        (["--keep", "5"], "of other --keep; "),
    ):
        with pytest.raises(SystemExit, match=said):
            reference.main([*same, *more])
    assert out.read_bytes() == written
    reference.main([*same, "--keep", "5", "--replace"])
    assert len(read_reference(out).measures) == 5
    with np.load(out) as file:
        arrays = {name: values for name, values in file.items() if name != "made_from"}
    np.savez(out, **arrays)  # as an older version wrote it
    with pytest.raises(SystemExit, match="of a version that did not say of what"):
        reference.main(same)


def test_statistics_of_stylegan_are_read_without_running_them(tmp_path):
    """Its pickle is a dict with sums; EDM2's has mu and sigma in an inner dict."""
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    fields = {"capture_all": False, "capture_mean_cov": True, "max_items": 30, "num_items": 30}
    fields |= {"num_features": 4, "all_features": [], "raw_mean": x.astype(np.float64).sum(0)}
    fields["raw_cov"] = x.T.astype(np.float64) @ x
    mean, covariance = x.mean(0, dtype=np.float64), np.cov(x.T, bias=True)
    edm2 = {"fid": {"mu": mean, "sigma": covariance}, "fd_dinov2": {"mu": mean[:2]}}
    for number, content in enumerate((fields, edm2)):
        path = tmp_path / f"{number}.pkl"
        path.write_bytes(pickle.dumps(content))
        found = read_reference(path)
        assert found.statistics.mean == pytest.approx(mean)
        assert found.statistics.covariance == pytest.approx(covariance, abs=1e-6)
        assert found[0] is found.spatial is found.measures is None
    refused = {
        "holds no statistics of images: .*raw_mean.*numpy.savez": {**fields, "raw_cov": None},
        r"a mean \(4,\) and a covariance \(3, 4\)": {**fields, "raw_cov": np.ones((3, 4))},
        "is refused: it asks for Python's .*system.*numpy.savez": Attack(),
    }
    for message, content in refused.items():
        (tmp_path / "bad.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=rf"bad\.pkl .*{message}"):
            read_reference(tmp_path / "bad.pkl")


class Attack:
    """Run a command where it is unpickled."""

    def __reduce__(self):
        return os.system, ("exit 1",)
