"""The evaluation command: figures against closed forms, features, references, restarts, and its errors."""

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gmflow_core import (
    GaussianMixtureSource,
    Guidance,
    load_checkpoint,
    sample_images,
    save_checkpoint,
    save_source,
)
from gmflow_core.models.gmdit import GMDiT, GMDiTConfig
from gmflow_core.models.mlp import GMFlowMLP, GMFlowMLPConfig
from training.data.shards import FORMAT, to_pixels, write_index, write_shard
from training.evaluate import main, parse
from training.evaluation import inputs, sampling
from training.evaluation.classifier import (
    Classifier,
    ClassifierConfig,
    ClassifierFeatures,
    train_classifier,
)
from training.evaluation.config import Config, settings_of, short_names
from training.evaluation.evaluation import Evaluation
from training.evaluation.inception import InceptionFeatures, fidelity
from training.evaluation.metrics import (
    Measures,
    Reference,
    Statistics,
    frechet_distance,
    histogram_distance,
    inception_score,
    measure,
    nearest_distance,
    precision_recall,
    score,
    statistics,
)
from training.evaluation.models import image_labels, image_modes, image_seeds
from training.evaluation.real_images import read_npz

ROOT = Path(__file__).parents[2]
CLASSES = ["left", "right"]


def two_classes(count: int, seed: int = 0, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images, bright on the left or on the right, in a colour of chance."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    colour = torch.rand(count, 3, 1, 1, generator=generator) * 160 + 60
    images = torch.rand(count, 3, size, size, generator=generator) * 40
    bright = (torch.arange(size) * 2 // size)[None, :] == labels[:, None]
    return (images + colour * bright[:, None, None, :]).to(torch.uint8), labels


def write_prepared(
    folder: Path, images: torch.Tensor, labels: torch.Tensor, classes=CLASSES, kind="pixels"
) -> Path:
    write_shard(folder / "shard-00000.safetensors", images, labels, {})
    shards = [{"file": "shard-00000.safetensors", "count": len(images)}]
    index = {
        "format": FORMAT,
        "kind": kind,
        "shape": list(images.shape[1:]),
        "classes": classes,
        "count": len(images),
    }
    write_index(folder, {**index, "shards": shards})
    return folder


def write_model(path: Path, seed: int = 0, data: dict | None = None, **changes) -> Path:
    """A tiny random network whose last layers are not zero, so that its samples differ."""
    torch.manual_seed(seed)
    settings = {
        "num_components": 2,
        "channels": 3,
        "latent_size": 8,
        "num_classes": 2,
        "num_layers": 1,
        "num_heads": 2,
    }
    network = GMDiT(GMDiTConfig(**{**settings, "head_dim": 8, "log_std_dim": 8, **changes}))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_checkpoint(network, path, data=data)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with train and test data, a model, and trained features."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_prepared(folder / "train", *two_classes(200))
    write_prepared(folder / "test", *two_classes(60, seed=1))
    write_model(folder / "tiny.safetensors", data={"labels": CLASSES, "space": "pixels"})
    images, labels = two_classes(200)
    train_classifier(images, labels, CLASSES, iterations=40, batch_size=32, progress=False).save(
        folder / "f.safetensors"
    )
    return folder


def arguments(place: Path, out: Path, *more: str) -> list[str]:
    base = [
        "--checkpoint",
        place / "tiny.safetensors",
        "--data",
        place / "train",
        "--features",
        place / "f.safetensors",
    ]
    sizes = [
        "--count",
        "50",
        "--chunk-size",
        "20",
        "--batch-size",
        "20",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--out",
        out,
    ]
    return [str(a) for a in [*base, *sizes, *more]]


def run(place: Path, out: Path, *more: str) -> dict:
    return Evaluation(parse(arguments(place, out, *more))).run()


def test_frechet_distance_of_gaussians():
    """|difference of means|^2 + sum (sd_a - sd_b)^2 for axis-aligned ones, in any common basis."""
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


def test_nearest_distance():
    reference = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    assert nearest_distance(
        torch.tensor([[0.0, 3.0], [10.0, 4.0], [4.0, 0.0]]), reference
    ) == pytest.approx(11 / 3)


def test_inception_score():
    """The number of classes if every image is sure of its class and all are alike often; 1 if all images look the same."""
    assert inception_score(torch.eye(5).repeat(40, 1)) == pytest.approx(5, rel=0.02)
    assert inception_score(torch.full((200, 5), 0.2)) == pytest.approx(1)


def torch_fidelity(module: str):
    """A module of torch-fidelity; the test is skipped where it does not import."""
    try:
        return fidelity(module)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def test_figures_are_those_of_torch_fidelity():
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(300, 16, generator=generator) @ torch.randn(16, 16, generator=generator),
        torch.randn(400, 16),
    )
    fid, isc, prc = (torch_fidelity(f"metric_{name}") for name in ("fid", "isc", "prc"))
    expected = fid.fid_statistics_to_metric(
        *map(fid.fid_features_to_statistics, (a.double(), b.double())), verbose=False
    )
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(*expected.values())
    expected = isc.isc_features_to_metric(a, splits=3, shuffle=False)["inception_score_mean"]
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


def test_classifier_learns_and_is_kept(tmp_path):
    images, labels = two_classes(200)
    settings = {
        "iterations": 40,
        "batch_size": 32,
        "progress": False,
        "test": two_classes(60, seed=1),
    }
    features = train_classifier(images, labels, CLASSES, **settings)
    assert features.training["accuracy"] >= 0.95
    assert features.fingerprint == train_classifier(images, labels, CLASSES, **settings).fingerprint
    features.save(tmp_path / "f.safetensors")
    again = ClassifierFeatures.load(tmp_path / "f.safetensors")
    assert (again.fingerprint, again.training, again.classes) == (
        features.fingerprint,
        features.training,
        features.classes,
    )
    found = again.extract(images[:5])
    assert found["features"].shape == (5, 64)
    assert found["probabilities"].sum(1).allclose(torch.ones(5))
    with pytest.raises(ValueError, match="8 x 8 pixels, not 16 x 16"):
        again.extract(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="cannot train"):
        train_classifier(images[:10], labels[:10], CLASSES)


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (64, 64)])
def test_classifier_of_any_small_size(size):
    features, logits = Classifier(ClassifierConfig(*size, 3, channels=8))(
        torch.zeros(2, 3, *size, dtype=torch.uint8)
    )
    assert (features.shape, logits.shape) == ((2, 64), (2, 3))
    with pytest.raises(ValueError, match="use --features inception"):
        ClassifierConfig(65, 65, 3)


def test_inception_weights(tmp_path, monkeypatch):
    """A random network in torch-fidelity's format; anything else is refused, a pickle with code unopened."""
    module = torch_fidelity("feature_extractor_inceptionv3")
    cls, name = module.FeatureExtractorInceptionV3, "inception-v3-compat"
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(cls, "load_state_dict", lambda *_: None)
        patch.setattr(torch.nn.init, "trunc_normal_", lambda t, **_: t)
        state = cls(name, ["2048"], None, verbose=False).state_dict()
    torch.save(state, tmp_path / "w.pth")
    features = InceptionFeatures(tmp_path / "w.pth")
    found = features.extract(
        torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, -1, -1)
    )
    assert (found["features"].shape, found["probabilities"].shape) == ((2, 2048), (2, 1008))
    assert found["probabilities"].sum(1).allclose(torch.ones(2))
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    (tmp_path / "bad.pth").write_bytes(b"\x80\x02cos\nsystem\n(S'exit 1'\ntR.")
    for weights in ("w.safetensors", "bad.pth", "none.pth"):
        with pytest.raises(
            (ValueError, FileNotFoundError), match=rf"{weights}.*--inception-weights.*--features"
        ):
            InceptionFeatures(tmp_path / weights)

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    with pytest.raises(
        ValueError, match=r"no network.*fetch https://\S+\.pth.*--inception-weights.*--features"
    ):
        InceptionFeatures()


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


def test_settings_of_a_sweep():
    sweep = ["--guidance", "0", ".1", "--cfg", "1", "2", "--steps", "2", "64"]
    config = parse(["--checkpoint", "a/k1.safetensors", "a/k8.safetensors", *sweep])
    settings = settings_of(config)
    assert [s.name for s in settings[:3]] == ["k1_gm-ode_2", "k1_gm-ode_2_w0.1", "k1_gm-ode_2_cfg2"]
    assert len(settings) == len({s.name for s in settings}) == 2 * 2 * 3
    assert [s.substeps(config) for s in settings[::3][:2]] == [64, 4]
    paper = parse(["--preset", "paper"])
    assert (paper.steps, len(paper.guidance), paper.count) == ((8, 32), 20, 50_000)
    assert short_names(["x/k1/model.safetensors", "x/k2/model.safetensors"]) == ["k1", "k2"]
    assert short_names(["x/k1/model.safetensors", "x/k1/weights.safetensors"]) == [
        "model",
        "weights",
    ]
    assert short_names(["x/k1/tiny.safetensors", "x/k2/tiny.safetensors"]) == ["k1-tiny", "k2-tiny"]
    assert short_names(["owner/name"]) == ["name"]
    with pytest.raises(ValueError, match="same model twice"):
        short_names(["a", "./a"])
    labels = image_labels(range(1000), 10)
    assert torch.equal(labels[3:5], image_labels([3, 4], 10))
    assert torch.bincount(labels).min() > 70


def test_whole_command(place, tmp_path, capsys):
    """A sweep with everything: trained features, real images, results, table, plots and sheets."""
    features = tmp_path / "new.safetensors"
    more = [
        "--features",
        features,
        "--feature-iterations",
        "5",
        "--test-data",
        place / "test",
        "--solver",
        "euler",
        "gm-sde",
    ]
    more += ["--steps", "1", "2", "--guidance", "0", ".3", "--cfg", "2", "--saturation", "digits"]
    main(arguments(place, tmp_path / "out", *map(str, more)))
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(report["results"]) == 2 * 2 * 3
    assert {r["network_calls"] for r in report["results"]} == {1, 2}
    assert all(
        r["count"] == 50 and r["frechet_distance"] > 0 and 0 <= r["precision"] <= 1
        for r in report["results"]
    )
    assert report["features"]["tested_on"] == "test data"
    assert report["features"]["accuracy"] == ClassifierFeatures.load(features).training["accuracy"]
    assert report["reference"]["images"] == 200
    assert report["floor"]["count"] == 50
    assert report["floor"]["frechet_distance"] < min(
        r["frechet_distance"] for r in report["results"]
    )
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 14
    for picture in (
        "calls.png",
        "guidance.png",
        "precision.png",
        "saturation.png",
        "sheets/tiny_euler_2_cfg2.png",
    ):
        assert (tmp_path / "out" / picture).stat().st_size > 1000
    assert str(tmp_path / "out" / "results.json") in capsys.readouterr().out


def test_goes_on_where_it_was_stopped(place, tmp_path, monkeypatch):
    report = run(place, tmp_path)
    chunks = sorted((tmp_path / "samples" / "tiny_gm-ode_2").glob("*"))
    before = {
        path.name: {name: t.clone() for name, t in load_file(path).items()} for path in chunks
    }
    written = [path.stat().st_mtime_ns for path in chunks]
    assert [len(t["images"]) for t in before.values()] == [20, 20, 10]

    calls = []
    sample = sampling.sample_images
    monkeypatch.setattr(
        sampling, "sample_images", lambda *a, **k: calls.append(k["seeds"]) or sample(*a, **k)
    )
    assert run(place, tmp_path) == report
    assert calls == []  # finished settings are not sampled, nor their chunks looked at

    (tmp_path / "results.json").unlink()
    chunks[1].unlink()
    chunks[2].write_bytes(chunks[2].read_bytes()[:-5])
    again = run(place, tmp_path)
    assert [(c[0], c[-1]) for c in calls] == [(20, 39), (40, 49)]
    assert chunks[0].stat().st_mtime_ns == written[0]
    for path in chunks:
        assert all(torch.equal(t, before[path.name][name]) for name, t in load_file(path).items())
    for row in (*report["results"], *again["results"]):
        row.pop("seconds")
    assert again == report

    longer = run(place, tmp_path, "--count", "70")  # the last chunk is short for this
    assert [(c[0], c[-1]) for c in calls[2:]] == [(40, 59), (60, 69)]
    assert longer["results"][0]["count"] == 70


def samples_of(place: Path, out: Path, *more: str) -> torch.Tensor:
    """The first 20 images of the only setting."""
    run(place, out, *more)
    (chunk,) = out.glob("samples/*/chunk-00000.safetensors")
    return load_file(chunk)["images"].int()


def test_every_setting_reaches_the_samples(place, tmp_path):
    """Each one changes the images; guidance does what sample_images does with it."""
    base = ["--steps", "3", "--guidance", ".3"]
    changes = {
        "plain": base,
        "weight": ["--steps", "3", "--guidance", ".6"],
        "none": ["--steps", "3"],
        "cfg": ["--steps", "3", "--cfg", "3"],
        "interval": [*base, "--guidance-interval", "0", ".5"],
        "order": [*base, "--order", "1"],
        "substeps": [*base, "--substeps", "1"],
        "shift": [*base, "--shift", "3"],
        "seed": [*base, "--seed", "1"],
        "solver": [*base, "--solver", "gm-sde"],
    }
    found = {name: samples_of(place, tmp_path / name, *more) for name, more in changes.items()}
    for a, b in itertools.combinations(found, 2):
        assert (found[a] - found[b]).abs().max() > 1, (a, b)
    network, seeds = load_checkpoint(place / "tiny.safetensors")[0], image_seeds(0, range(20))
    labels = image_labels(seeds, 2)
    for name, guidance in (("plain", Guidance(0.3)), ("cfg", Guidance(3.0, "cfg"))):
        x = sample_images(
            network, labels, steps=3, substeps=128 // 3, guidance=guidance, seeds=seeds
        )
        assert (to_pixels(x).int() - found[name]).abs().max() <= 1


def test_files_of_another_size_are_made_anew(place, tmp_path):
    """The last file of 50 images by 20 is as long as a file by 10, and of other images."""
    expected = run(place, tmp_path / "ten", "--chunk-size", "10")["results"][0]
    run(place, tmp_path / "changed")
    (tmp_path / "changed" / "results.json").unlink()
    found = run(place, tmp_path / "changed", "--chunk-size", "10")["results"][0]
    assert found["frechet_distance"] == pytest.approx(expected["frechet_distance"], rel=1e-4)


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


def test_other_batches_and_processes_give_the_same_images(place, tmp_path):
    more = ["--solver", "gm-sde", "--guidance", ".2"]
    run(place, tmp_path / "one", *more)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "OMP_NUM_THREADS": "1",
        }
    command = [
        sys.executable,
        "-m",
        "training.evaluate",
        *arguments(place, tmp_path / "two", *more, "--batch-size", "7"),
    ]
    processes = []
    for rank in "01":  # as torchrun starts them
        environment = {
            **os.environ,
            **where,
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        )
    for process in processes:
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 0, error
    one, two = (
        json.loads((tmp_path / name / "results.json").read_text())["results"][0]
        for name in ("one", "two")
    )
    for metric in ("frechet_distance", "saturation"):
        assert one[metric] == pytest.approx(two[metric], rel=0.01)
    for name in ("chunk-00000.safetensors", "chunk-00002.safetensors"):
        a, b = (
            load_file(tmp_path / out / "samples" / "tiny_gm-sde_2_w0.2" / name)
            for out in ("one", "two")
        )
        assert torch.equal(a["labels"], b["labels"])
        assert (a["images"].int() - b["images"].int()).abs().float().mean() < 0.1


def test_discarded_samples_leave_figures(place, tmp_path):
    report = run(place, tmp_path, "--discard-samples")
    assert not (tmp_path / "samples" / "tiny_gm-ode_2").exists()
    (tmp_path / "results.json").unlink()
    assert run(place, tmp_path, "--discard-samples") == report


def test_references(place, tmp_path):
    """Images in a folder and in an .npz give the figures of the prepared folder they were made from."""
    from PIL import Image

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


class HalfVAE:
    """Two pixels a side for each latent."""

    factor = 2

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3).tanh()


def test_latents_are_decoded(tmp_path, monkeypatch):
    latents = torch.randn(100, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    write_prepared(tmp_path / "train", latents, torch.arange(100) % 2, kind="latents")
    write_model(tmp_path / "tiny.safetensors", channels=4, latent_size=4)
    more = ["--features", str(tmp_path / "f.safetensors"), "--feature-iterations", "2"]
    with pytest.raises(ValueError, match="give --vae"):
        run(tmp_path, tmp_path / "out", *more)
    monkeypatch.setattr(inputs, "load_vae", lambda *_: HalfVAE())
    row = run(tmp_path, tmp_path / "out", *more, "--vae", "half")["results"][0]
    assert row["out_of_range"] is None
    chunk = load_file(tmp_path / "out" / "samples" / "tiny_gm-ode_2" / "chunk-00000.safetensors")
    assert chunk["images"].shape == (20, 3, 8, 8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": 1}, "--count is 1"),
        ({"steps": (8, -1)}, "--steps has -1"),
        ({"solver": ("heun",)}, "--solver heun is unknown"),
        ({"guidance": (1.5,)}, "is it a --cfg scale"),
        ({"cfg": (0.5,)}, "is it a --guidance weight"),
        ({"features": "resnet"}, "give inception"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        Config(**wrong)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--checkpoint", "none.safetensors"], "none.safetensors"),
        (["--data", "nowhere"], "nowhere.*training.prepare"),
        (["--reference", "nowhere"], "no reference nowhere"),
        (
            ["--checkpoint", "{}/more.safetensors"],
            "more.safetensors knows 3 classes, but .*train has 2",
        ),
        (
            ["--checkpoint", "{}/small.safetensors"],
            r"small.safetensors makes samples of shape \(3, 4, 4\)",
        ),
        (["--checkpoint", "{}/points.safetensors"], "points.safetensors holds a GMFlowMLP"),
        (["--features", "{}/tiny.safetensors"], "tiny.safetensors holds no features"),
        (
            ["--features", "{}/other.safetensors"],
            "other.safetensors is a classifier of 2 classes.*16 x 16.*another file name",
        ),
        (["--test-data", "{}/latents"], "latents has latents .* prepare both"),
    ],
)
def test_errors_name_the_file_and_the_fix(more, message, place, tmp_path):
    if not (place / "more.safetensors").exists():
        write_model(place / "small.safetensors", latent_size=4)
        save_checkpoint(GMFlowMLP(GMFlowMLPConfig(num_components=2)), place / "points.safetensors")
        ClassifierFeatures(Classifier(ClassifierConfig(16, 16, 2)), CLASSES, {}).save(
            place / "other.safetensors"
        )
        write_prepared(
            place / "latents", torch.zeros(4, 4, 8, 8), torch.arange(4) % 2, kind="latents"
        )
        write_model(place / "more.safetensors", num_classes=3)
    with pytest.raises(SystemExit, match=message):
        main(arguments(place, tmp_path, *(m.format(place) for m in more)))


def test_samples_of_another_checkpoint_are_refused(place, tmp_path):
    run(place, tmp_path / "out")
    write_model(tmp_path / "tiny.safetensors", seed=1)
    more = ["--checkpoint", str(tmp_path / "tiny.safetensors")]
    with pytest.raises(ValueError, match=r"chunk-00000.*another checkpoint.*--restart"):
        run(place, tmp_path / "out", *more)
    assert run(place, tmp_path / "out", *more, "--restart")["results"]


def test_measures_without_labels_have_none():
    one = Measures(torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2))
    assert Measures.cat([one, one]).labels is None
    assert len(Measures.cat([one, one])) == 4


def test_models_of_a_mixture_source(place, tmp_path):
    source = GaussianMixtureSource(
        0.3 * torch.randn(5, 3, 8, 8), torch.full((5, 1, 1, 1), 0.5), torch.full((5,), 0.2).log()
    )
    save_source(source, tmp_path / "source.safetensors")
    about = {
        "space": "pixels",
        "source": {"num_modes": 5, "shape": [3, 8, 8], "coupling": "soft", "conditioning": "mode"},
    }
    model = write_model(tmp_path / "modes.safetensors", data=about, num_classes=5)
    weak = write_model(tmp_path / "weak.safetensors", seed=1, data=about, num_classes=5)
    with pytest.raises(
        ValueError, match=r"modes.safetensors was trained with a mixture source; give --source"
    ):
        run(place, tmp_path / "out", "--checkpoint", str(model))
    with pytest.raises(
        ValueError,
        match=r"tiny.safetensors was trained without a mixture source; leave the source out",
    ):
        run(place, tmp_path / "out", "--source", str(tmp_path / "source.safetensors"))
    more = ["--checkpoint", str(model), "--source", str(tmp_path / "source.safetensors")]
    [row] = run(place, tmp_path / "out", *more)["results"]
    assert row["frechet_distance"] > 0
    assert row["class_accuracy"] is None  # modes are no classes
    [guided] = run(place, tmp_path / "guided", *more, "--guide", str(weak))["results"]
    [idle] = run(place, tmp_path / "idle", *more, "--guide", str(weak), "--guide-scale", "1")[
        "results"
    ]
    assert idle["frechet_distance"] == pytest.approx(row["frechet_distance"], rel=1e-3)
    assert guided["frechet_distance"] != pytest.approx(row["frechet_distance"], rel=1e-3)
    [early] = run(place, tmp_path / "early", *more, "--end", "0.3")["results"]
    assert early["frechet_distance"] != pytest.approx(row["frechet_distance"], rel=1e-3)
    given = arguments(
        place,
        tmp_path / "alone",
        *more,
        "--reference",
        str(place / "train"),
        "--test-data",
        str(place / "test"),
    )
    at = given.index("--data")
    report = Evaluation(
        parse(given[:at] + given[at + 2 :])
    ).run()  # without the data, whose classes it does not know
    assert report["results"][0]["frechet_distance"] == pytest.approx(
        row["frechet_distance"], rel=1e-4
    )
    assert report["floor"]["frechet_distance"] < row["frechet_distance"]
    other = write_model(
        tmp_path / "other.safetensors",
        data={**about, "source": {**about["source"], "conditioning": "hidden"}},
    )
    with pytest.raises(
        ValueError, match="have other labels; a guide is told what the model is told"
    ):
        run(place, tmp_path / "wrong", *more, "--guide", str(other))
    with pytest.raises(
        ValueError, match=r"--unlabelled does not go with .*whose labels are the modes"
    ):
        run(place, tmp_path / "wrong", *more, "--unlabelled")


def test_samples_without_a_label(place, tmp_path):
    [row] = run(place, tmp_path / "out", "--unlabelled")["results"]
    assert row["class_accuracy"] is None
    found = samples_of(place, tmp_path / "samples", "--unlabelled")
    network, _ = load_checkpoint(place / "tiny.safetensors")
    seeds = image_seeds(0, range(len(found)))
    expected = sample_images(
        network, torch.full((len(found),), 2), steps=2, seeds=seeds, substeps=64
    )
    assert (found.float() - to_pixels(expected).float()).abs().max() <= 1
    write_model(tmp_path / "unlabelled.safetensors", data={"space": "pixels", "unlabelled": True})
    [row] = run(
        place, tmp_path / "by_itself", "--checkpoint", str(tmp_path / "unlabelled.safetensors")
    )["results"]
    assert row["class_accuracy"] is None


def test_no_steps_give_the_noise(place, tmp_path):
    found = samples_of(place, tmp_path, "--steps", "0")
    noise = torch.stack(
        [
            torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i))
            for i in range(len(found))
        ]
    )
    assert (found.float() - to_pixels(noise).float()).abs().max() <= 1
    source = GaussianMixtureSource(
        3 + torch.randn(4, 3, 8, 8), torch.full((4, 1, 1, 1), 0.5), torch.full((4,), 0.25).log()
    )
    modes = torch.tensor([2, 0, 3])
    network = SimpleNamespace(
        config=SimpleNamespace(channels=3, latent_size=8, num_classes=4),
        parameters=lambda: iter([noise]),
    )
    for labels, solver in ((None, "gm-ode"), (torch.zeros(3), "euler")):
        x = sample_images(
            network, labels, solver=solver, steps=0, source=source, modes=modes, seeds=range(3)
        )
        assert torch.allclose(x, source.draw(modes, noise=noise[:3]), atol=1e-6)


def test_modes_say_nothing_of_the_noise():
    source = GaussianMixtureSource(
        torch.zeros(8, 2), torch.ones(8, 1), torch.full((8,), 1 / 8).log()
    )
    seeds = image_seeds(0, range(2000))
    modes = image_modes(seeds, source)
    noise = torch.stack(
        [torch.randn(16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    among = torch.stack([noise.square()[modes == mode].mean(0) for mode in range(8)])
    assert (among - 1).abs().max() < 0.45  # 250 of each: five standard errors
