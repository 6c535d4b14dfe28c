"""Training on a folder of images that the encoder turns into latents on the way."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gmflow_core import read_metadata
from gmflow_core.source.files import save_source
from tests.clusters import same_source
from tests.training.image_folders import run, write_images, write_tiny_vae
from tests.training.image_runs import SMALL, losses_of
from tests.training.source_runs import config
from tests.training.test_distill import gmdit, teacher_file
from tests.training.test_distill import new_trainer as new_student
from tests.training.test_rae import write_rae
from training.data.batches import Order
from training.data.encoded_images import EncodedImages
from training.data.image_folder import list_images
from training.data.shards import LatentDataset
from training.encoders.fingerprints import fingerprint
from training.encoders.load import load_vae
from training.imagenet import parse
from training.loop.image_trainer import ImageTrainer
from training.source import fitting
from training.source.fitting import fit

COUNT = 13  # images


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def rae(tmp_path_factory) -> Path:
    """Write a tiny RAE of 8 x 8 images, with statistics."""
    return write_rae(tmp_path_factory.mktemp("rae"))


def new_trainer(data: Path, out: Path, *more: str) -> ImageTrainer:
    given = ["--preset", "digits", *SMALL, "--spectrum-layers", "None", "--batch-size", "4"]
    return ImageTrainer(parse([*given, "--data", str(data), "--out", str(out), *more]))


def encoding(vae: Path, *more: str) -> list[str]:
    return ["--encode", "--vae", str(vae), "--image-size", "8", *more]


def test_without_flips_the_losses_are_those_of_the_cache(images, rae, tmp_path):
    run(images, tmp_path / "cache", pixels=False, vae=str(rae), flip=False)
    cached = new_trainer(tmp_path / "cache", tmp_path / "a")
    trainer = new_trainer(images, tmp_path / "b", *encoding(rae, "--no-flip"))
    expected = losses_of(cached, 6)  # almost two epochs
    assert losses_of(trainer, 6) == pytest.approx(expected, rel=1e-4)
    assert trainer.data() == cached.data()
    assert trainer.data()["labels"] == ["cat", "dog"]


def test_the_first_epoch_is_what_prepare_writes(images, rae, tmp_path):
    """Compare flips, and for a VAE the samples of the posterior, with the cache's."""
    for name, vae in (("rae", rae), ("vae", write_tiny_vae(tmp_path / "vae"))):
        run(images, tmp_path / name, pixels=False, vae=str(vae), seed=3)
        cached = LatentDataset(tmp_path / name).__getitems__(range(COUNT))
        network = load_vae(vae)
        listed = list_images(images)
        encoded = EncodedImages(
            listed, network, listed.folders, name=name, size=8, flip=True, seed=3
        )
        epochs = [encoded.crops.__getitems__(range(e * COUNT, (e + 1) * COUNT)) for e in range(3)]
        found = [encoded.encode(batch, torch.device("cpu")) for batch in epochs]
        torch.testing.assert_close(found[0], cached, rtol=1e-4, atol=1e-5)
        flips = [(b.pixels != epochs[0].pixels).flatten(1).any(1).sum() for b in epochs[1:]]
        assert all(0 < changed < COUNT for changed in flips)
        if network.needs_noise:
            assert not (epochs[1].noise == epochs[0].noise).any()
        parts = [encoded.crops.__getitems__(range(0, 5)), encoded.crops.__getitems__(range(5, 13))]
        parts = [encoded.encode(batch, torch.device("cpu"))[0] for batch in parts]
        torch.testing.assert_close(torch.cat(parts), found[0][0], rtol=1e-4, atol=1e-5)
        encoded.precision = "bf16"
        half = encoded.encode(epochs[0], torch.device("cpu"))[0]
        error = (half - found[0][0]).square().mean() / found[0][0].square().mean()
        assert 0 < error < 1e-3


def test_numbers_tell_the_epoch_on_any_number_of_processes():
    def numbers(rows):
        found = iter(Order(5, 4, rows, 1, seed=0, first=0, epochs=True))
        return [next(found) for _ in range(5)]

    whole, parts = numbers(range(4)), zip(numbers(range(2)), numbers(range(2, 4)), strict=True)
    assert whole == [first + second for first, second in parts]
    assert sorted(n for batch in whole for n in batch) == list(
        range(20)
    )  # four epochs of five images
    plain = iter(Order(5, 4, range(4), 1, seed=0, first=0))
    assert [[n % 5 for n in batch] for batch in whole] == [next(plain) for _ in range(5)]


def test_a_run_resumes_exactly_with_the_same_vae_only(images, rae, tmp_path):
    more = encoding(rae, "--class-names", str(tmp_path / "names.json"), "--accumulate", "2")
    (tmp_path / "names.json").write_text('{"cat": "a cat", "dog": "a dog"}')
    losses = losses_of(new_trainer(images, tmp_path / "whole", *more), 9)
    stopped = new_trainer(images, tmp_path / "run", *more)
    assert losses_of(stopped, 5) == losses[:5]
    stopped.save()
    resumed = new_trainer(images, tmp_path / "run", *more, "--workers", "1")
    assert losses_of(resumed, 4) == losses[5:]
    assert read_metadata(resumed.path)["data"]["labels"] == ["a cat", "a dog"]
    picture = resumed.draw_picture(resumed.sampling_model())  # by the decoder
    assert picture.shape[2] == 3
    shutil.copytree(rae, tmp_path / "rae")
    with pytest.raises(ValueError, match=r"other settings \(vae: .* there, .* here\)"):
        new_trainer(images, tmp_path / "run", *encoding(tmp_path / "rae", *more[5:]))
    with pytest.raises(ValueError, match=r"other settings \(flip: True there, False here\)"):
        new_trainer(images, tmp_path / "run", *more, "--no-flip")


def test_a_source_is_fitted_and_used_without_a_cache(images, rae, tmp_path, monkeypatch):
    for name in ("draw_report", "draw_weights"):
        monkeypatch.setattr(fitting, name, lambda *_: None)
    run(images, tmp_path / "cache", pixels=False, vae=str(rae), flip=False, dtype="float16")
    settings = {"encoder": str(rae / "encoder"), "encoder_size": 28, "image_size": 8, "modes": 2}
    expected = fit(config(tmp_path / "cache", tmp_path / "a", flip=True, **settings))
    settings["vae"] = str(rae)
    source = fit(config(images, tmp_path / "b", **settings, batch_size=5))
    same_source(source, expected, 2e-3)  # the cache is of float16
    same_source(source.assigner, expected.assigner, 1e-6)
    labels = [np.load(tmp_path / name / "labels.npy") for name in ("a", "b")]
    assert np.array_equal(*labels)
    assert set(labels[0]) == {0, 1}
    modes = ["--mode-conditional", "--class-dropout", "0", "--source", str(tmp_path / "b")]
    cached = new_trainer(tmp_path / "cache", tmp_path / "cached", *modes)
    given = encoding(rae, "--no-flip", *modes)
    losses = losses_of(new_trainer(images, tmp_path / "encoded", *given), 6)
    assert losses == pytest.approx(losses_of(cached, 6), rel=1e-3)
    made = {"encoder": "dinov2", "encoder_size": 14, "image_size": 8}
    save_source(source, tmp_path / "c" / "source.safetensors", facts={"config": made})
    with pytest.raises(ValueError, match=r"makes tokens of input_size 28, size 8, but .* 14, size"):
        new_trainer(images, tmp_path / "other", *encoding(rae, *modes[:-1], str(tmp_path / "c")))
    with pytest.raises(ValueError, match="leave --vae out"):
        fit(config(tmp_path / "cache", tmp_path / "d", **settings))


def test_images_that_cannot_be_read_are_left_out_by_name(rae, tmp_path, capsys, monkeypatch):
    data = write_images(tmp_path / "images")
    broken = [data / "cat" / "0.png", data / "cat" / "1.bmp"]
    for path in broken:
        path.write_bytes(b"no picture")
    losses_of(new_trainer(data, tmp_path / "out", *encoding(rae)), 7)  # two epochs
    said = capsys.readouterr().out
    for path in broken:
        assert said.count(f"note: {path} (not an image that Pillow can read) is left out") == 1
    monkeypatch.setattr("training.data.encoded_images.MOST_IN_A_ROW", 2)
    with pytest.raises(ValueError, match="has 2 images in a row that cannot be read, such as"):
        losses_of(new_trainer(data, tmp_path / "other", *encoding(rae)), 7)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--encode"], "--vae is None; it must be given with --encode"),
        (["--no-flip"], "--flip is False; it must be left out without --encode"),
        (["--image-size", "8"], "--image-size is 8; it must be left out without --encode"),
    ],
)
def test_settings_that_need_each_other(more, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        new_trainer(tmp_path, tmp_path / "out", *more)
    assert re.search(message, " ".join(capsys.readouterr().err.replace("│", " ").split()))


def test_what_does_not_fit_is_refused(images, rae, tmp_path):
    run(images, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"was written by training\.prepare; leave --encode out"):
        new_trainer(tmp_path / "cache", tmp_path / "out", *encoding(rae))
    with pytest.raises(ValueError, match="pictures of 16x16 do not fit this RAE"):
        new_trainer(images, tmp_path / "out", *encoding(rae), "--image-size", "16")
    listed, vae = list_images(images), load_vae(write_tiny_vae(tmp_path / "vae"))
    encoded = EncodedImages(listed, vae, listed.folders, name="the VAE", size=8)
    with pytest.raises(ValueError, match="by tokens, and the VAE makes none; give an RAE"):
        encoded.find_tokens({}, "the source")


def test_a_vae_that_cannot_decode_the_samples_is_refused(images, rae, tmp_path):
    run(images, tmp_path / "cache", pixels=False, vae=str(rae))
    blind, vae = write_rae(tmp_path / "blind", decoder=None), write_tiny_vae(tmp_path / "vae")
    student = teacher_file(tmp_path, gmdit(channels=8), space="rae")
    validated = ["--features", "x.safetensors", "--validate-every", "1"]
    for name, said in ((blind, "has no decoder"), (vae, r"shape \(4, 4, 4\), and .* \(8, 4, 4\)")):
        for new, data in ((new_trainer, tmp_path / "cache"), (new_student, student)):
            more = [10] if new is new_student else []
            with pytest.raises(ValueError, match=f"--vae {name} .*{said}"):
                new(data, tmp_path / "out", *more, "--vae", str(name))
    encode = encoding(blind, "--image-size", "64")  # 16 pixels for each token, if it does not say
    assert new_trainer(images, tmp_path / "out", *encode).vae is None
    with pytest.raises(ValueError, match=f"--vae {blind} has no decoder"):
        new_trainer(images, tmp_path / "out", *encode, *validated)


def test_a_vae_that_changes_under_its_name_is_refused(images, tmp_path):
    """Statistics are added to rae.json; folders and checkpoints of older versions go on."""
    rae = write_rae(tmp_path / "rae", statistics=None)
    how = {"pixels": False, "vae": str(rae), "shard_size": 10}
    run(images, tmp_path / "cache", **how)
    new_trainer(images, tmp_path / "out", *encoding(rae)).save()
    write_rae(rae)
    with pytest.raises(ValueError, match=r"other settings \(its autoencoder has other weights"):
        run(images, tmp_path / "cache", **how)
    with pytest.raises(ValueError, match=r"other settings \(its autoencoder has other weights"):
        new_trainer(images, tmp_path / "out", *encoding(rae))
    plan = json.loads((tmp_path / "cache" / "plan.json").read_text())
    del plan["vae_fingerprint"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "plan.json").write_text(json.dumps(plan))
    run(images, tmp_path / "old", **how)
    assert json.loads((tmp_path / "old" / "plan.json").read_text()) == plan
    fingerprints = {fingerprint(load_vae(rae), decoding=d) for d in (False, True)}
    assert len({*fingerprints, fingerprint(load_vae(write_rae(rae, decoder=None)))}) == 2
