"""Command training.fit_source: prepared samples, arrays, tokens, processes, its errors."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.mixture import GaussianMixture

from gmflow_core.source.em import fit_mixture
from gmflow_core.source.files import load_source, read_source_metadata
from tests import forked
from tests.clusters import clusters, moments_by_hand, same_source
from tests.helpers import F64, normal
from tests.training.source_runs import arguments, config, write_images, write_prepared
from training.data.shards import LatentDataset
from training.data.tokens import TokenFiles, check_encoder, read_tokens
from training.fit_source import main
from training.source import fitting, labels
from training.source.fitting import fit
from training.source.report import effective_number


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture
def prepared(images, tmp_path):
    return write_prepared(images, tmp_path / "prepared")


def test_command_on_prepared_samples(prepared, tmp_path):
    source = fit(config(prepared, tmp_path / "out", modes=2))
    assert (source.shape, source.is_spherical, source.assigner) == ((3, 16, 16), True, None)
    again = load_source(tmp_path / "out")
    same_source(source, again)
    metadata = read_source_metadata(tmp_path / "out")
    assert metadata["training"]["flip"]  # training.prepare mirrored some
    assert metadata["data"] == {"space": "pixels"}
    x = torch.stack([sample for sample, _ in LatentDataset(prepared)])
    twins = torch.cat([x, x.flip(-1)])
    weights = source.responsibilities(twins).sum(0)
    assert torch.allclose(weights / weights.sum(), source.weights, atol=1e-3)
    assert torch.allclose(
        source.weights @ source.means.flatten(1), twins.mean(0).flatten(), atol=1e-4
    )
    for name in ("report.png", "weights.png"):
        assert Image.open(tmp_path / "out" / name).width > 500
    modes = np.load(tmp_path / "out" / "labels.npy")  # of the samples, not of their mirror images
    assert modes.dtype == np.int64
    assert np.array_equal(modes, source.responsibilities(x).argmax(1))
    assert not list((tmp_path / "out").glob("labels_*"))


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.safetensors"])
def test_command_on_arrays(tmp_path, name):
    x = clusters(count=400, dims=2, modes=3).numpy().astype(np.float32)
    path = tmp_path / name
    if name == "x.npy":
        np.save(path, x)
    elif name == "x.npz":
        np.savez(path, tokens=x, labels=np.arange(400))
    else:
        save_file({"x": torch.from_numpy(x), "labels": torch.arange(400)}, path)
    source = fit(config(path, tmp_path / "out", covariance="diagonal", seed=2))
    assert not source.is_spherical
    same_source(source, fit_mixture(torch.from_numpy(x), 3, seed=2).source, 1e-6)
    theirs = GaussianMixture(3, covariance_type="diag", means_init=source.means.numpy())
    theirs.weights_, theirs.means_ = source.weights.numpy(), source.means.numpy()
    theirs.precisions_cholesky_ = (1 / source.std).numpy()
    assert np.array_equal(np.load(tmp_path / "out" / "labels.npy"), theirs.predict(x))
    with pytest.raises(ValueError, match="num_modes: 3 there, 4 here"):
        fit(config(path, tmp_path / "out", modes=4, covariance="diagonal", seed=2))
    assert fit(config(path, tmp_path / "out", modes=4, restart=True)).num_modes == 4


def test_token_files_and_their_errors(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(12.0).reshape(4, 3))
    save_file({"x": torch.arange(12.0, 18).view(2, 3).half()}, tmp_path / "b.safetensors")
    files = TokenFiles([tmp_path / "a.npy", tmp_path / "b.safetensors"])
    assert torch.cat([chunk.float() for chunk in files]).flatten().tolist() == list(range(18))
    middle = TokenFiles(files.paths, range(3, 5))
    assert torch.cat([chunk.float() for chunk in middle]).tolist() == [[9, 10, 11], [12, 13, 14]]
    np.save(tmp_path / "objects.npy", np.array([{}, {}]))
    np.save(tmp_path / "flat.npy", np.arange(3))
    for name, message in (
        ("objects", "holds values of type 'object', not numbers"),
        ("flat", r"holds {'tokens': \[3\]}"),
        ("none", "there is no"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            TokenFiles([tmp_path / f"{name}.npy"])
    with pytest.raises(ValueError, match="different shapes"):
        TokenFiles([tmp_path / "a.npy", tmp_path / "b.safetensors", *[save_four(tmp_path)]])


def save_four(folder):
    np.save(folder / "four.npy", np.zeros((2, 4)))
    return folder / "four.npy"


def test_command_with_tokens_of_another_file(prepared, tmp_path):
    dataset = LatentDataset(prepared)
    sides = dataset.labels.double().unsqueeze(1) + 0.05 * normal(60, 4, dtype=F64)
    np.save(tmp_path / "tokens.npy", sides.numpy())
    source = fit(
        config(prepared, tmp_path / "out", modes=2, tokens=tmp_path / "tokens.npy", flip=False)
    )
    assert source.assigner.shape == (4,)
    assert not source.assigner.is_spherical
    tokens = read_tokens(prepared)  # kept beside the samples
    assert torch.allclose(tokens, sides.float())
    modes = load_source(tmp_path / "out").posterior_modes(tokens, "hard")
    assert np.array_equal(np.load(tmp_path / "out" / "labels.npy"), modes)
    x = torch.stack([sample for sample, _ in dataset])
    means, var = moments_by_hand(x, modes, 2, False, True)
    assert torch.allclose(source.means.double(), means, atol=1e-5)
    assert torch.allclose(source.std.double().square(), var, atol=1e-5)
    np.save(tmp_path / "fewer.npy", sides[:59].numpy())
    with pytest.raises(ValueError, match=r"holds 59 tokens of \(4,\), but .* has 60 samples"):
        fit(config(prepared, tmp_path / "other", modes=2, tokens=tmp_path / "fewer.npy"))
    np.save(tmp_path / "same.npy", sides.numpy())
    fit(config(prepared, tmp_path / "again", modes=2, tokens=tmp_path / "same.npy"))
    np.save(tmp_path / "tokens.npy", sides.numpy() + 1)  # in the place of the first ones
    given = {"modes": 2, "tokens": tmp_path / "tokens.npy"}
    with pytest.raises(ValueError, match="holds other tokens than"):
        fit(config(prepared, tmp_path / "other", **given))
    (prepared / "tokens.safetensors").unlink()
    fit(config(prepared, tmp_path / "other", **given))
    check_encoder(prepared, read_source_metadata(tmp_path / "other")["training"], "")
    with pytest.raises(ValueError, match="holds other tokens than those that out was fitted to"):
        check_encoder(prepared, read_source_metadata(tmp_path / "out")["training"], "out")


def test_a_pass_over_the_samples_goes_on_where_it_was_stopped(prepared, tmp_path, monkeypatch):
    np.save(tmp_path / "tokens.npy", clusters(count=60, modes=3, dims=4).numpy())
    given = {"tokens": tmp_path / "tokens.npy"}
    whole = fit(config(prepared, tmp_path / "whole", **given))
    read, size = [], 3 * 16 * 16
    monkeypatch.setattr(fitting, "KEEP_EVERY", -1.0)
    monkeypatch.setattr(fitting, "CHUNK", 16 * size)  # four chunks of samples

    def to_device(x, device):
        read.append(len(x))
        if len(read) == 3:
            raise KeyboardInterrupt
        return x

    monkeypatch.setattr(fitting, "to_device", to_device)
    with pytest.raises(KeyboardInterrupt):
        fit(config(prepared, tmp_path / "out", **given))
    with pytest.raises(ValueError, match=r"moments_0\.safetensors is of another fit"):
        fit(config(prepared, tmp_path / "out", covariance="diagonal", **given))
    source = fit(config(prepared, tmp_path / "out", **given))
    assert read == [16, 16, 16, 16, 12]
    same_source(source, whole, 1e-6)
    assert not list((tmp_path / "out").glob("moments_*"))


def test_labels_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", clusters(count=60, modes=3, dims=4).numpy())
    fit(config(tmp_path / "x.npy", tmp_path / "whole"))
    monkeypatch.setattr(labels, "KEEP_EVERY", -1.0)
    monkeypatch.setattr("training.data.tokens.CHUNK", 4 * 16)  # four chunks of samples
    read = []

    def to_device(x, device):
        read.append(len(x))
        if len(read) == 3:
            raise KeyboardInterrupt
        return x

    monkeypatch.setattr(labels, "to_device", to_device)
    with pytest.raises(KeyboardInterrupt):
        fit(config(tmp_path / "x.npy", tmp_path / "out"))
    assert not (tmp_path / "out" / "labels.npy").exists()
    fit(config(tmp_path / "x.npy", tmp_path / "out"))
    assert read == [16, 16, 16, 16, 12]
    found, whole = (np.load(tmp_path / name / "labels.npy") for name in ("out", "whole"))
    assert np.array_equal(found, whole)
    labels.part_file(tmp_path / "out", 0).write_bytes(b"damaged")  # it is only found anew
    fit(config(tmp_path / "x.npy", tmp_path / "out"))
    assert np.array_equal(np.load(tmp_path / "out" / "labels.npy"), whole)


def test_the_effective_number_of_modes():
    assert effective_number(torch.full((5,), 0.2)) == pytest.approx(5)
    assert effective_number(torch.tensor([1.0, 0.0])) == 1
    assert effective_number(torch.tensor([0.5, 0.25, 0.25])) == pytest.approx(2**1.5)


def test_two_processes_find_what_one_finds(prepared, tmp_path):
    """With gloo, as torchrun starts them: EM on the tokens and the pass over the samples."""
    tokens = clusters(count=60, modes=3, dims=4).numpy()
    np.save(tmp_path / "tokens.npy", tokens)
    one = fit(config(prepared, tmp_path / "one", tokens=tmp_path / "tokens.npy"))
    options = {"data": prepared, "out": tmp_path / "two", "modes": 3}
    options["tokens"] = tmp_path / "tokens.npy"
    for _, said, status in forked.run_ranks("-m", "training.fit_source", *arguments(**options)):
        assert status == 0, said
    two = load_source(tmp_path / "two")
    same_source(two, one, 1e-5)
    same_source(two.assigner, one.assigner, 1e-5)
    found, expected = (np.load(tmp_path / name / "labels.npy") for name in ("two", "one"))
    assert np.array_equal(found, expected)


def test_errors_of_the_command(tmp_path, images):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=r"was not written by training\.prepare"):
        main(arguments(data=images, out=out, modes=2))
    with pytest.raises(ValueError, match="--modes is 0; it must be at least 1"):
        config(images, out, modes=0)
    with pytest.raises(SystemExit, match=r"there is no .*none\.npy"):
        main(arguments(data=tmp_path / "none.npy", out=out, modes=2))


def test_convert_command(tmp_path):
    x = clusters(count=200)
    tokens = GaussianMixture(3, covariance_type="diag", random_state=0).fit(x.numpy())
    (tmp_path / "cls.pkl").write_bytes(pickle.dumps(tokens))
    latents = {"means": np.zeros((3, 2, 4, 4), np.float32), "variances": np.ones(3)}
    (tmp_path / "latents.pkl").write_bytes(pickle.dumps(latents))
    out = tmp_path / "source.safetensors"
    files = [tmp_path / "latents.pkl", "--out", out, "--assigner", tmp_path / "cls.pkl"]
    main(["convert", *map(str, files)])
    source = load_source(out)
    assert (source.shape, source.assigner.shape) == ((2, 4, 4), (5,))
    assert np.allclose(source.weights, tokens.weights_)
    (tmp_path / "short.pkl").write_bytes(pickle.dumps({**latents, "weights": np.ones(2) / 2}))
    for name, message in (
        ("short", r"short\.pkl holds a mixture that is none .*not one for each of 3 modes"),
        ("none", "there is no file"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["convert", str(tmp_path / f"{name}.pkl"), "--out", str(out)])
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(SystemExit, match=r"refused: it asks for Python's os\.system"):
        main(["convert", str(tmp_path / "evil.pkl"), "--out", str(out)])
