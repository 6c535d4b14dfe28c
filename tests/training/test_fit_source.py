"""Fitting of Gaussian-mixture sources: EM against scikit-learn, streams, resume, processes, given modes; the command."""

import math
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.mixture import GaussianMixture

from gmflow_core.source import em as source_fit
from gmflow_core.source.em import fit_mixture, kmeans_plus_plus
from gmflow_core.source.files import load_source, read_source_metadata
from gmflow_core.source.moments import RunningMoments, fit_given_modes
from gmflow_core.source.source import GaussianMixtureSource
from tests.helpers import F64, normal
from training.data.preparation import PreparationConfig as PrepareConfig
from training.data.preparation import prepare
from training.data.shards import LatentDataset
from training.data.tokens import TokenFiles, read_tokens, write_tokens
from training.encoders.encoder import ENCODERS
from training.fit_source import main
from training.source import fitting
from training.source.config import Config
from training.source.fitting import fit

ROOT = Path(__file__).parents[2]
FIELDS = ("means", "std", "log_weights")


def clusters(count=1500, dims=5, modes=6, seed=0, offset=20.0):
    """Overlapping clusters far from the origin, float64."""
    generator = torch.Generator().manual_seed(seed)
    centres = offset + 2 * torch.randn(modes, dims, generator=generator, dtype=F64)
    std = 0.4 + torch.rand(modes, dims, generator=generator, dtype=F64)
    label = torch.randint(0, modes, (count,), generator=generator)
    return centres[label] + std[label] * torch.randn(count, dims, generator=generator, dtype=F64)


def start_at(x, modes, std=1.2):
    log_weights = torch.full((modes,), -math.log(modes), dtype=F64)
    return GaussianMixtureSource(x[:modes], torch.full((modes, 1), std, dtype=F64), log_weights)


def scikit_learns(x, start, kind):
    precisions = start.std.reciprocal().square()
    given = precisions.flatten() if kind == "spherical" else precisions.expand_as(start.means)
    return GaussianMixture(
        start.num_modes, covariance_type=kind, means_init=start.means.numpy(), precisions_init=given.numpy(),
        weights_init=start.weights.numpy(),
    ).fit(x.numpy())  # fmt: skip


def same_source(one, other, tolerance=0.0):
    for name in FIELDS:
        a, b = getattr(one, name), getattr(other, name)
        assert (
            torch.equal(a, b)
            if tolerance == 0
            else torch.allclose(a, b, rtol=tolerance, atol=tolerance)
        ), name
    return True


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-9), (torch.float32, 5e-5)])
@pytest.mark.parametrize("kind", ["diag", "spherical"])
def test_equals_scikit_learn_from_the_same_start(kind, dtype, tolerance):
    x = clusters()
    start = start_at(x, 6)
    there = scikit_learns(x, start, kind)
    here = fit_mixture(x, 6, start=start, spherical=kind == "spherical", dtype=dtype)
    assert len(here.log_likelihoods) == there.n_iter_
    assert here.converged
    assert here.log_likelihoods[-1] == pytest.approx(there.lower_bound_, abs=tolerance)
    assert np.allclose(here.source.means, there.means_, rtol=tolerance)
    assert np.allclose(here.source.weights, there.weights_, rtol=10 * tolerance)
    assert np.allclose(
        here.source.std.square(), there.covariances_.reshape(6, -1), rtol=tolerance, atol=tolerance
    )
    assert here.source.is_spherical == (kind == "spherical")


def test_its_own_start_is_as_good_as_scikit_learns():
    x = clusters(modes=12, count=2000)
    ours = [fit_mixture(x, 12, seed=seed).log_likelihoods[-1] for seed in range(3)]
    theirs = [
        GaussianMixture(12, covariance_type="diag", init_params="k-means++", random_state=seed)
        .fit(x.numpy())
        .lower_bound_
        for seed in range(3)
    ]
    assert max(ours) > max(theirs) - 0.05
    assert min(ours) > min(theirs) - 0.1
    assert fit_mixture(x, 12, seed=1).log_likelihoods[-1] == ours[1]


def test_k_means_plus_plus_finds_clusters_that_lie_apart():
    """As far apart as these are, every centre must land in a cluster of its own."""
    generator = torch.Generator().manual_seed(0)
    corners = 100.0 * torch.cartesian_prod(*[torch.arange(3.0)] * 3)  # 27
    x = corners.repeat(40, 1) + torch.randn(1080, 3, generator=generator)
    for seed in range(3):
        nearest = torch.cdist(kmeans_plus_plus(x, 27, seed), corners).argmin(1)
        assert nearest.unique().numel() == 27
    assert len(kmeans_plus_plus(torch.ones(5, 2), 4)) == 4  # nothing is apart from anything


def test_the_start_may_see_a_part_only(monkeypatch):
    monkeypatch.setattr(source_fit, "START_ROWS", (10, 20))
    x = clusters(offset=0.0)
    survey = source_fit.look_at([x], 6, torch.device("cpu"))
    rows = source_fit._subset([x[:700], x[700:]], survey, 6, 0, survey.mean)
    assert rows.shape == (60, 5)
    assert (torch.cdist(rows + survey.mean, x).min(1).values < 1e-6).all()
    assert rows.unique(dim=0).shape == rows.shape
    assert fit_mixture(x, 6, max_iterations=30).source.num_modes == 6


def test_chunks_of_any_size_give_the_same(monkeypatch):
    monkeypatch.setattr(source_fit, "BLOCK", 6 * 250)
    x = clusters().float()
    whole = fit_mixture(x, 6, max_iterations=8)
    for size in (1, 77, 1000):
        parts = fit_mixture(x.split(size), 6, max_iterations=8)
        same_source(parts.source, whole.source)
        assert parts.log_likelihoods == whole.log_likelihoods
    monkeypatch.setattr(source_fit, "BLOCK", 2**24)
    same_source(fit_mixture(x, 6, max_iterations=8).source, whole.source, 1e-4)


def test_a_fit_that_was_stopped_ends_in_the_same_bits(tmp_path):
    x, state = clusters().float(), tmp_path / "state.safetensors"
    whole = fit_mixture(x, 6, max_iterations=9, tolerance=0)

    def stop(done, log_likelihood):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_mixture(x, 6, max_iterations=9, tolerance=0, state=state, progress=stop)
    seen = []
    again = fit_mixture(
        x,
        6,
        max_iterations=9,
        tolerance=0,
        state=state,
        progress=lambda done, log_likelihood: seen.append(done),
    )
    assert seen == [5, 6, 7, 8, 9]
    assert again.log_likelihoods == whole.log_likelihoods
    same_source(again.source, whole.source)
    with pytest.raises(ValueError, match="num_modes: 6 there, 5 here"):
        fit_mixture(x, 5, state=state)
    with pytest.raises(ValueError, match="another mean"):
        fit_mixture(x + 1, 6, state=state)


def test_a_mode_that_loses_its_samples_stays_with_the_smallest_variance():
    x = clusters(modes=2, offset=0.0)
    means = torch.cat([x[:2], torch.full((1, 5), 1e4, dtype=F64)])
    start = GaussianMixtureSource(
        means, torch.ones(3, 1, dtype=F64), torch.full((3,), 1 / 3, dtype=F64).log()
    )
    source = fit_mixture(x, 3, start=start, dtype=F64, reg_covar=1e-4).source
    assert torch.allclose(source.means[2], means[2])
    assert torch.allclose(source.std[2], torch.tensor(0.01, dtype=F64))
    assert source.weights[2] < 1e-12
    assert source.weights[:2].min() > 0.1


def test_bad_tokens_are_named():
    x = clusters(count=100).float()
    with pytest.raises(
        ValueError, match=r"100 samples cannot be fitted with 101 modes; give 1 to 100"
    ):
        fit_mixture(x, 101)
    broken = x.clone()
    broken[[3, 64], 1] = torch.tensor([math.nan, math.inf])
    with pytest.raises(ValueError, match=r"rows 3, 64 of 100 tokens are not finite"):
        fit_mixture(broken.split(30), 4)
    with pytest.raises(
        ValueError, match=r"a chunk of tokens is \(100, 4\) after ones of 5 numbers"
    ):
        fit_mixture([x, x[:, :4]], 4)
    with pytest.raises(ValueError, match="only once"):
        fit_mixture(iter([x]), 4)
    with pytest.raises(
        ValueError, match=r"the log-likelihood is (nan|-inf) at iteration 1: .* too large"
    ):
        fit_mixture(1e25 * x, 4)


# Given modes


def by_hand(x, modes, num_modes, flip, spherical):
    """Mean and variance of every mode, in float64, from all of its samples at once."""
    x = torch.cat([x, x.flip(-1)]) if flip else x
    modes = torch.cat([modes, modes]) if flip else modes
    means, variances = [], []
    for mode in range(num_modes):
        mine = x[modes == mode].double()
        means.append(mine.mean(0))
        var = mine.var(0, correction=0)
        variances.append(var.mean().view(1, 1, 1) if spherical else var)
    return torch.stack(means), torch.stack(variances)


@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize("flip", [False, True])
def test_given_modes_against_all_samples_at_once(spherical, flip):
    """Far from the origin, in small chunks: sums of squares in float32 would have no digits left."""
    x, modes = 1000 + 0.1 * normal(300, 3, 4, 4), torch.arange(300) % 4
    chunks = zip(x.split(32), modes.split(32), strict=True)
    source = fit_given_modes(chunks, 4, (3, 4, 4), flip=flip, spherical=spherical)
    means, var = by_hand(x, modes, 4, flip, spherical)
    assert torch.allclose(source.means.double(), means, rtol=3e-7)
    assert torch.allclose(source.std.double().square(), var, rtol=2e-3)
    assert torch.allclose(source.weights, torch.full((4,), 0.25))


def test_empty_modes_are_the_average_of_the_others():
    x, modes = normal(90, 2, 3, 3), torch.arange(90) % 3 * 2  # 1 and 3 are empty
    source = fit_given_modes([(x, modes)], 5, (2, 3, 3))
    assert torch.allclose(source.means[1], source.means[[0, 2, 4]].mean(0), atol=1e-6)
    assert torch.allclose(source.std[3].square(), source.std[[0, 2, 4]].square().mean(0))
    assert source.weights.tolist() == pytest.approx([1 / 3, 0, 1 / 3, 0, 1 / 3])
    assigner = GaussianMixtureSource(normal(5, 4), torch.ones(5, 1), torch.full((5,), 0.2).log())
    assigned = fit_given_modes([(x, modes)], 5, (2, 3, 3), assigner=assigner)
    assert torch.equal(assigned.log_weights, assigner.log_weights)
    assert assigned.assigner.num_modes == 5


def test_given_modes_say_what_does_not_fit():
    moments = RunningMoments(3, (2, 2, 2))
    with pytest.raises(
        ValueError,
        match=r"samples \(4, 2, 2\) of modes \(4,\) came to a mixture of samples \(2, 2, 2\)",
    ):
        moments.add(normal(4, 2, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"modes between 0 and 3 do not fit a mixture of 3 modes"):
        moments.add(normal(4, 2, 2, 2), torch.arange(4))
    x = normal(4, 2, 2, 2)
    x[2, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="rows 2 of 4 samples are not finite"):
        moments.add(x, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="no samples came"):
        moments.source()


# The command


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of 16x16 pictures, one bright on the left, and a file that is none."""
    root, rng = tmp_path_factory.mktemp("data") / "images", np.random.default_rng(0)
    for folder in ("left", "right"):
        (root / folder).mkdir(parents=True)
        for number in range(30):
            pixels = rng.integers(0, 60, (16, 16, 3))
            pixels[:, slice(8) if folder == "left" else slice(8, 16)] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(root / folder / f"{number:02d}.png")
    (root / "left" / "15b.png").write_bytes(b"no picture")
    return root


@pytest.fixture
def prepared(images, tmp_path):
    prepare(
        PrepareConfig(
            data=images,
            out=tmp_path / "prepared",
            size=16,
            pixels=True,
            shard_size=32,
            workers=0,
            device="cpu",
        )
    )
    return tmp_path / "prepared"


def config(data, out, **changes):
    return Config(
        **{"data": data, "out": out, "modes": 3, "device": "cpu", "workers": 0, **changes}
    )


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
    assert Image.open(tmp_path / "out" / "report.png").width > 500


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
        ("objects", "no whole array file"),
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
    x = torch.stack([sample for sample, _ in dataset])
    means, var = by_hand(x, modes, 2, False, True)
    assert torch.allclose(source.means.double(), means, atol=1e-5)
    assert torch.allclose(source.std.double().square(), var, atol=1e-5)
    np.save(tmp_path / "fewer.npy", sides[:59].numpy())
    with pytest.raises(ValueError, match=r"holds 59 tokens of \(4,\), but .* has 60 samples"):
        fit(config(prepared, tmp_path / "other", modes=2, tokens=tmp_path / "fewer.npy"))
    np.save(tmp_path / "more.npy", sides.numpy())
    with pytest.raises(ValueError, match="holds other tokens"):
        fit(config(prepared, tmp_path / "other", modes=2, tokens=tmp_path / "more.npy"))


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


def test_two_processes_find_what_one_finds(prepared, tmp_path):
    """With gloo, as torchrun starts them: EM on the tokens and the pass over the samples."""
    tokens = clusters(count=60, modes=3, dims=4).numpy()
    np.save(tmp_path / "tokens.npy", tokens)
    one = fit(config(prepared, tmp_path / "one", tokens=tmp_path / "tokens.npy"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
    ]
    options = [
        "--data",
        prepared,
        "--out",
        tmp_path / "two",
        "--modes",
        "3",
        "--tokens",
        tmp_path / "tokens.npy",
    ]
    done = subprocess.run(
        [*command, "training.fit_source", *map(str, options), "--device", "cpu"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    two = load_source(tmp_path / "two")
    same_source(two, one, 1e-5)
    same_source(two.assigner, one.assigner, 1e-5)


def test_errors_of_the_command(tmp_path, images):
    with pytest.raises(SystemExit, match=r"was not written by training\.prepare"):
        main(
            [
                "--data",
                str(images),
                "--out",
                str(tmp_path / "out"),
                "--modes",
                "2",
                "--device",
                "cpu",
            ]
        )
    with pytest.raises(ValueError, match="--modes is 0; it must be at least 1"):
        config(images, tmp_path / "out", modes=0)
    with pytest.raises(SystemExit, match=r"there is no .*none\.npy"):
        main(
            [
                "--data",
                str(tmp_path / "none.npy"),
                "--out",
                str(tmp_path / "out"),
                "--modes",
                "2",
                "--device",
                "cpu",
            ]
        )


def test_convert_command(tmp_path):
    x = clusters(count=200)
    tokens = GaussianMixture(3, covariance_type="diag", random_state=0).fit(x.numpy())
    (tmp_path / "cls.pkl").write_bytes(pickle.dumps(tokens))
    latents = {"means": np.zeros((3, 2, 4, 4), np.float32), "variances": np.ones(3)}
    (tmp_path / "latents.pkl").write_bytes(pickle.dumps(latents))
    out = tmp_path / "source.safetensors"
    main(
        [
            "convert",
            str(tmp_path / "latents.pkl"),
            "--out",
            str(out),
            "--assigner",
            str(tmp_path / "cls.pkl"),
        ]
    )
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


# Encoders

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 16,
}


def tiny_encoder(kind, folder):
    """A random encoder of the kind in a folder, and its tokens of pictures in [-1, 1], by transformers alone."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    if kind == "dinov2":
        network = transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**TINY)
        )

        def tokens(x):
            return network(x).last_hidden_state[:, 0]
    elif kind == "siglip2":
        text = {
            "vocab_size": 16,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        settings = transformers.SiglipConfig(
            text_config=text, vision_config={**TINY, "intermediate_size": 16}
        )
        network = transformers.SiglipModel(settings)
        mean = std = torch.full((3, 1, 1), 0.5)

        def tokens(x):
            return network.vision_model(x).pooler_output
    else:
        settings = transformers.ViTMAEConfig(**TINY, intermediate_size=16, mask_ratio=0.75)
        network = transformers.ViTMAEModel(settings)

        def tokens(x):
            network.config.mask_ratio = 0.0
            return network(x).last_hidden_state[:, 0]

    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    network.eval().save_pretrained(folder)
    return lambda x: tokens(((x + 1) / 2 - mean) / std).detach()


@pytest.mark.parametrize("kind", ENCODERS)
def test_command_with_an_encoder(kind, images, prepared, tmp_path, capsys):
    exact = tiny_encoder(kind, tmp_path / "encoder")
    settings = {
        "encoder": str(tmp_path / "encoder"),
        "encoder_size": 16,
        "image_size": 16,
        "batch_size": 7,
    }
    source = fit(config(prepared, tmp_path / "out", modes=2, **settings))
    assert source.assigner.shape == (16,)
    files = [f for f in sorted(images.rglob("*.png")) if f.name != "15b.png"]
    pixels = np.stack([np.array(Image.open(file)) for file in files])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    tokens = read_tokens(prepared)
    assert torch.allclose(tokens, exact(x), atol=1e-4)
    assert tokens.std(0).max() > 0.01
    assert list(prepared.glob("*.parts")) == []
    before = (prepared / "tokens.safetensors").stat().st_mtime_ns
    fit(config(prepared, tmp_path / "again", **settings))  # with other modes, on the same tokens
    assert (prepared / "tokens.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds other tokens"):
        fit(config(prepared, tmp_path / "other", **{**settings, "image_size": 8}))


def test_encoding_goes_on_where_it_was_stopped(images, tmp_path, monkeypatch):
    """Of images without latents: what is fitted are their tokens."""
    tiny_encoder("dinov2", tmp_path / "encoder")
    data = tmp_path / "images"
    for file in sorted(images.rglob("*.png")):
        if file.name != "15b.png":
            (data / file.parent.name).mkdir(parents=True, exist_ok=True)
            (data / file.parent.name / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr("training.data.encode_tokens.PART", 20)
    settings = {"encoder": str(tmp_path / "encoder"), "encoder_size": 16, "image_size": 16}
    good = (data / "right" / "20.png").read_bytes()
    (data / "right" / "20.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"20\.png cannot be read"):
        fit(config(data, tmp_path / "out", **settings))
    assert len(list((tmp_path / "out" / "tokens.parts").iterdir())) == 2
    (data / "right" / "20.png").write_bytes(good)
    written = []

    def write(path, *arguments):
        written.append(path.name)
        write_tokens(path, *arguments)

    monkeypatch.setattr("training.data.encode_tokens.write_tokens", write)
    source = fit(config(data, tmp_path / "out", **settings))
    assert written == ["00002.safetensors", "tokens.safetensors"]
    assert (source.shape, source.is_spherical) == ((16,), False)


# Encoders in several processes

AVERAGES = """
import torch
from training import fit_source
from training.data import encode_tokens as tokens

class Average(torch.nn.Module):
    def forward(self, images):
        return images.mean(3).flatten(1)

    def token(self, hidden):
        return hidden

tokens.PART = 20
tokens.load_encoder = lambda *_: Average()
fit_source.main()
"""


def by_two(*options):
    """Exit status and what was said of each of two processes, which nobody watches over."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "OMP_NUM_THREADS": "1",
        }
    command = [
        sys.executable,
        "-c",
        AVERAGES,
        *map(str, options),
        "--encoder",
        "average",
        "--image-size",
        "16",
    ]
    processes = []
    for rank in "01":
        environment = {
            **os.environ,
            **where,
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        settings = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
        processes.append(
            subprocess.Popen([*command, "--device", "cpu", "--workers", "0"], **settings)
        )
    try:
        return [(process.communicate(timeout=120)[1], process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_a_process_may_have_no_part(images, tmp_path):
    """One image for two processes: one encodes, fits and adds up nothing."""
    (tmp_path / "images" / "left").mkdir(parents=True)
    shutil.copy(images / "left" / "00.png", tmp_path / "images" / "left")
    settings = {"size": 16, "pixels": True, "workers": 0, "device": "cpu", "flip": False}
    prepare(PrepareConfig(data=tmp_path / "images", out=tmp_path / "prepared", **settings))
    for said, status in by_two(
        "--data", tmp_path / "prepared", "--out", tmp_path / "out", "--modes", "1"
    ):
        assert status == 0, said
    source, (x, _) = (
        load_source(tmp_path / "out"),
        LatentDataset(tmp_path / "prepared").__getitems__([0]),
    )
    assert torch.allclose(source.means, x)
    assert torch.allclose(source.assigner.means, x.mean(3).flatten(1), atol=1e-6)
    assert torch.equal(source.weights, torch.ones(1))


def test_an_error_of_one_process_ends_all(images, tmp_path):
    """The broken picture is in the first one's part."""
    ends = by_two("--data", images, "--out", tmp_path / "out", "--modes", "2")
    for said, status in ends:
        assert status == 1, said
        assert re.search(r"15b\.png cannot be read", said), said
    assert "Traceback" not in "".join(said for said, _ in ends)
