"""Command training.evaluate: its settings, its samples, restarts, and its errors."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from gmflow_core import (
    GaussianMixtureSource,
    Guidance,
    load_checkpoint,
    sample_images,
    save_checkpoint,
)
from gmflow_core.files.errors import FileError
from gmflow_core.models.mlp import GMFlowMLP, GMFlowMLPConfig
from gmflow_core.models.vae import SD_VAE
from gmflow_core.sampling.solvers import SOLVERS
from tests import forked
from tests.diffusers_folder import random_model, write_published_folder
from tests.training.evaluation_runs import (
    CLASSES,
    arguments,
    run,
    samples_of,
    write_model,
    write_place,
    write_prepared,
)
from training.data.shards import to_pixels
from training.encoders.load import load_vae
from training.evaluate import main, parse
from training.evaluation import chunks, inputs, sampling
from training.evaluation.classifier import Classifier, ClassifierConfig, ClassifierFeatures
from training.evaluation.config import Config, settings_of, short_names
from training.evaluation.evaluation import read_results
from training.evaluation.models import Space, class_shares, image_labels, image_seeds


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with training and test data, a model, and trained features."""
    return write_place(tmp_path_factory.mktemp("evaluate"))


def test_settings_of_a_sweep():
    sweep = ["--guidance", "0", ".1", "--cfg", "1", "2", "--steps", "2", "64"]
    config = parse(["--checkpoint", "a/k1.safetensors", "a/k8.safetensors", *sweep])
    settings = settings_of(config)
    assert [s.name for s in settings[:3]] == ["k1_gm-ode_2", "k1_gm-ode_2_w0.1", "k1_gm-ode_2_cfg2"]
    assert len(settings) == len({s.name for s in settings}) == 2 * 2 * 3
    assert [s.substeps(config) for s in settings[::3][:2]] == [64, 4]
    every = parse(["--checkpoint", "a.safetensors", "--solver", *SOLVERS])
    assert {s.solver: s.substeps(every) for s in settings_of(every)} == {
        **dict.fromkeys(SOLVERS),
        "gm-ode": 128 // 8,
        "gm-policy": 128,
    }
    paper = parse(["--preset", "paper"])
    assert (paper.steps, len(paper.guidance), paper.count) == ((8, 32), 20, 50_000)
    assert short_names(["x/k1/model.safetensors", "x/k2/model.safetensors"]) == ["k1", "k2"]
    assert short_names(["x/k1/model.safetensors", "x/k1/weights.safetensors"]) == [
        "model",
        "weights",
    ]
    assert short_names(["x/k1/tiny.safetensors", "x/k2/tiny.safetensors"]) == ["k1-tiny", "k2-tiny"]
    assert short_names(["owner/name"]) == ["name"]
    assert short_names(["a/b", "b"]) == ["a-b", "b"]
    assert short_names(["."]) == ["here"]
    with pytest.raises(ValueError, match="the same name"):
        short_names(["a/b", "b", "a-b"])
    with pytest.raises(ValueError, match="same model twice"):
        short_names(["a", "./a"])
    labels = image_labels(range(1000), 10)
    assert torch.equal(labels[3:5], image_labels([3, 4], 10))
    assert torch.bincount(labels).min() > 70
    shares = class_shares(torch.tensor([0, 2, 2, 2]), 4)
    labels = image_labels(range(1000), 4, shares)
    assert torch.equal(labels[3:5], image_labels([3, 4], 4, shares))
    assert shares.tolist() == [0.25, 0, 0.75, 0]
    assert class_shares(labels, 4).tolist() == pytest.approx([0.25, 0, 0.75, 0], abs=0.04)


def test_whole_command(place, tmp_path, capsys):
    """Run a sweep that trains features, and writes results, table, plots and sheets."""
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


def test_every_setting_reaches_the_samples(place, tmp_path):
    """Each setting changes the images; guidance does what sample_images does with it."""
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
        "spectrum": [*base, "--solver", "gm-sde", "--no-spectrum"],
        "classes": [*base, "--class-shares", "data"],
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


def test_samples_of_another_precision_are_not_mixed(place, tmp_path):
    exact = run(place, tmp_path / "exact")
    assert exact["precision"] == "fp32"  # auto, on a CPU
    more = ["--precision", "bf16"]
    found = (
        samples_of(place, tmp_path / "bf16", *more) - samples_of(place, tmp_path / "fp32")
    ).abs()
    assert found.max() > 0
    assert found.float().mean() < 2  # of 255
    assert json.loads((tmp_path / "bf16" / "results.json").read_text())["precision"] == "bf16"
    with pytest.raises(ValueError, match="sampled with another precision"):
        run(place, tmp_path / "exact", *more)


@pytest.mark.parametrize(
    "content",
    [
        "[",
        "[1]",
        '{"results": 5}',
        '{"results": [{"name": 3}]}',
        '{"results": [{"name": "a"}]}',
        '{"results": [], "floor": [1]}',
        '{"results": ' + "[" * 10**5,
    ],
)
def test_damaged_results_are_named(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(FileError, match=r"results\.json .*delete it: samples are kept"):
        read_results(tmp_path / "results.json")


def test_files_of_another_size_are_made_anew(place, tmp_path):
    """With 50 images, the last file of 20 is as long as a file of 10, but has other images."""
    expected = run(place, tmp_path / "ten", "--chunk-size", "10")["results"][0]
    run(place, tmp_path / "changed")
    (tmp_path / "changed" / "results.json").unlink()
    found = run(place, tmp_path / "changed", "--chunk-size", "10")["results"][0]
    assert found["frechet_distance"] == pytest.approx(expected["frechet_distance"], rel=1e-4)


def test_other_batches_and_processes_give_the_same_images(place, tmp_path):
    more = ["--solver", "gm-sde", "--guidance", ".2"]
    run(place, tmp_path / "one", *more)
    given = arguments(place, tmp_path / "two", *more, "--batch-size", "7")
    for _, said, status in forked.run_ranks("-m", "training.evaluate", *given):
        assert status == 0, said
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


def test_figures_of_older_versions_that_discarded_their_samples_count(tmp_path, monkeypatch):
    """These versions had the name of the VAE alone in their keys."""
    latents = torch.randn(100, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    write_prepared(tmp_path / "train", latents, torch.arange(100) % 2, kind="latents")
    write_model(tmp_path / "tiny.safetensors", channels=4, latent_size=4)
    more = ["--features", str(tmp_path / "f.safetensors"), "--feature-iterations", "2"]
    more += ["--vae", "half", "--discard-samples"]
    monkeypatch.setattr(inputs, "load_vae", lambda *_: HalfVAE())
    with monkeypatch.context() as before:
        before.setattr(inputs, "MARK", "vae")
        before.setattr(inputs, "fingerprint", lambda *_, **__: "half")
        rows = run(tmp_path, tmp_path / "out", *more)["results"]
    (tmp_path / "out" / "results.json").unlink()
    monkeypatch.setattr(inputs, "fingerprint", lambda *_, **__: "a")
    monkeypatch.setattr(chunks.Chunks, "write", None)  # so nothing is sampled or measured
    assert run(tmp_path, tmp_path / "out", *more)["results"] == rows


class HalfVAE:
    """Stand-in for a VAE with 2 x 2 pixels for each latent pixel."""

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
    monkeypatch.setattr(inputs, "fingerprint", lambda *_, **__: "a")
    row = run(tmp_path, tmp_path / "out", *more, "--vae", "half")["results"][0]
    assert row["out_of_range"] is None
    chunk = load_file(tmp_path / "out" / "samples" / "tiny_gm-ode_2" / "chunk-00000.safetensors")
    assert chunk["images"].shape == (20, 3, 8, 8)
    monkeypatch.setattr(inputs, "fingerprint", lambda *_, **__: "b")
    with pytest.raises(ValueError, match="was sampled with another VAE of this name than"):
        run(tmp_path, tmp_path / "out", *more, "--vae", "half")


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
        ClassifierFeatures(
            Classifier(ClassifierConfig(16, 16, 2)), CLASSES, {"accuracy": 0.5}
        ).save(place / "other.safetensors")
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


def test_samples_without_a_label(place, tmp_path):
    with pytest.raises(ValueError, match=r"--class-shares data does not go with .*tiny"):
        run(place, tmp_path / "wrong", "--unlabelled", "--class-shares", "data")
    for more in (["--guidance", ".3"], ["--cfg", "4"]):
        with pytest.raises(ValueError, match=r"samples of no class, which those of .*tiny"):
            run(place, tmp_path / "wrong", "--unlabelled", *more)
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


def test_a_published_model_is_decoded_by_its_own_vae(tmp_path):
    pytest.importorskip("diffusers")
    labels = {str(number): f"class {number}" for number in range(10)}
    for name, weights in (("with", True), ("without", False)):
        write_published_folder(tmp_path / name, random_model(), labels=labels, vae_weights=weights)
    own, usual = (Space.of_checkpoint(str(tmp_path / name)).vae for name in ("with", "without"))
    assert (own, usual) == (str(tmp_path / "with" / "vae"), SD_VAE)
    assert load_vae(own).network.config.latent_channels == 4


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
