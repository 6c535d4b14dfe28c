"""Gaussian-mixture source: draws, assignment, moments, files, published mixtures in pickles."""

import builtins
import copy
import dataclasses
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gmflow_core.source.files import load_source, read_source_metadata, save_source
from gmflow_core.source.moments import RunningMoments
from gmflow_core.source.pickles import convert_pickle
from gmflow_core.source.source import GaussianMixtureSource, LogJoint, _choose
from tests.helpers import F64, normal


def random_source(
    modes=5, shape=(3, 4, 4), spherical=True, dtype=torch.float32, seed=0, assigner=None
):
    std = (
        0.3
        + normal(modes, *([1] * len(shape) if spherical else shape), seed=seed + 1, dtype=F64).abs()
    )
    log_weights = normal(modes, seed=seed + 2, dtype=F64).log_softmax(0)
    tensors = (2 * normal(modes, *shape, seed=seed, dtype=F64), std, log_weights)
    return GaussianMixtureSource(*(t.to(dtype) for t in tensors), assigner)


def exact_responsibilities(source, x):
    """Compute p(m | x) in float64, with every difference written out."""
    means, std = (
        source.means.double().flatten(1),
        source.std.double().expand_as(source.means).flatten(1),
    )
    offset = (x.double().flatten(1).unsqueeze(1) - means) / std
    return (source.log_weights.double() - 0.5 * offset.square().sum(2) - std.log().sum(1)).softmax(
        1
    )


def test_draws_have_the_modes_moments_and_frequencies():
    source = random_source(modes=4, shape=(2, 3))
    x, modes = source.sample(60_000, torch.Generator().manual_seed(0))
    assert torch.allclose(modes.bincount(minlength=4) / 60_000, source.weights, atol=0.01)
    for mode in range(4):
        mine = x[modes == mode]
        margin = 5 * source.std[mode].item() / len(mine) ** 0.5
        assert (mine.mean(0) - source.means[mode]).abs().max() < margin
        assert (mine.std(0) - source.std[mode]).abs().max() < margin
    mean, std = source.moments([1, 3])
    assert torch.equal(mean, source.means[[1, 3]])
    assert std.shape == (2, 1, 1)


def test_one_generator_each_makes_a_sample_independent_of_its_batch():
    source = random_source()

    def draw(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return source.sample(len(seeds), generators)

    (three, modes), (one, mode) = draw([5, 6, 7]), draw([6])
    assert torch.equal(three[1:2], one)
    assert modes[1] == mode[0]
    noise = normal(1, 3, 4, 4)
    assert torch.equal(
        source.draw(mode, noise=noise), source.means[mode] + source.std[mode] * noise
    )


@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_responsibilities_against_brute_force(spherical, dtype, monkeypatch):
    source = random_source(modes=7, shape=(3, 5), spherical=spherical, dtype=dtype)
    shifted = dataclasses.replace(source, means=source.means + 50)
    x = (
        source.draw(source.draw_modes(40, torch.Generator().manual_seed(1)), noise=normal(40, 3, 5))
        + 50
    )
    tolerance = 1e-11 if dtype == F64 else 1e-4
    found, exact = shifted.responsibilities(x), exact_responsibilities(shifted, x)
    assert (found - exact).abs().max() < tolerance
    monkeypatch.setattr("gmflow_core.source.source.BLOCK", 2 * 15)  # two modes at a time
    again = dataclasses.replace(shifted)
    assert (again.responsibilities(x) - exact).abs().max() < tolerance
    assert len(again._log_joints[1]) == 4


def test_what_a_posterior_needs_of_the_source_is_computed_once(monkeypatch):
    source, made = random_source(assigner=random_source(modes=5, shape=(6,), seed=9)), []
    monkeypatch.setattr(
        LogJoint,
        "__init__",
        lambda self, *a, made=made, of=LogJoint.__init__: made.append(1) or of(self, *a),
    )
    for _ in range(3):
        source.posterior_modes(normal(8, 6))
    assert len(made) == 1
    moved = source.to(dtype=F64)  # has its own
    assert moved.responsibilities(normal(8, 6)).dtype == F64
    assert len(made) == 2


def test_a_posterior_waits_for_no_device():
    """Run on the device "meta", where reading a value fails; NaN samples still get a mode."""
    source = random_source()
    away = copy.copy(random_source())  # a copy, as a constructor reads the values
    for name in ("means", "std", "log_weights"):
        object.__setattr__(away, name, getattr(source, name).to("meta"))
    for coupling in ("soft", "hard"):
        modes = away.posterior_modes(
            torch.empty(4, 3, 4, 4, device="meta"), coupling, uniform=torch.empty(4, device="meta")
        )
        assert (modes.shape, modes.device.type) == ((4,), "meta")
        assert away.moments(modes)[0].shape == (4, 3, 4, 4)
    lost = _choose(torch.full((1, 5), torch.nan), 1, None, torch.tensor([0.5]))
    assert 0 <= lost.item() < 5


def test_posterior_modes_are_drawn_from_the_posterior():
    source = GaussianMixtureSource(
        torch.tensor([[-1.0], [0.0], [1.0]]), torch.ones(3, 1), torch.full((3,), 1 / 3).log()
    )
    x = torch.full((30_000, 1), 0.7)
    soft = source.posterior_modes(x, generator=torch.Generator().manual_seed(0))
    exact = exact_responsibilities(source, x[:1])[0].float()
    assert torch.allclose(soft.bincount(minlength=3) / len(x), exact, atol=0.01)
    assert source.posterior_modes(x[:2], "hard").tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"'independent' is neither.*draw_modes"):
        source.posterior_modes(x, "independent")


def test_an_assigner_takes_tokens():
    assigner = random_source(modes=5, shape=(6,), spherical=False, seed=9)
    source = random_source(modes=5, assigner=assigner)
    tokens = normal(8, 6)
    assert torch.equal(source.responsibilities(tokens), assigner.responsibilities(tokens))
    with pytest.raises(ValueError, match=r"tokens of \(6,\), but \(3, 4, 4\) came"):
        source.responsibilities(normal(8, 3, 4, 4))
    alone = dataclasses.replace(source, assigner=None)
    assert alone.responsibilities(source.means).argmax(1).tolist() == [0, 1, 2, 3, 4]


def test_modes_of_weight_0_are_never_drawn():
    log_weights = torch.tensor([-torch.inf, 0.0, -torch.inf])
    source = GaussianMixtureSource(normal(3, 2), torch.ones(3, 1), log_weights)
    assert set(source.draw_modes(1000).tolist()) == {1}
    assert source.posterior_modes(source.means).tolist() == [1, 1, 1]


@pytest.mark.parametrize("spherical", [True, False])
def test_flipped_source_draws_flipped_samples(spherical):
    source, modes, noise = (
        random_source(spherical=spherical),
        torch.tensor([4, 0, 4]),
        normal(3, 3, 4, 4),
    )
    assert torch.equal(
        source.flipped().draw(modes, noise=noise.flip(-1)), source.draw(modes, noise=noise).flip(-1)
    )
    with pytest.raises(ValueError, match="no width to flip"):
        random_source(shape=(4,)).flipped()


@pytest.mark.parametrize("spherical", [True, False])
def test_files_round_trip(tmp_path, spherical):
    source = random_source(spherical=spherical, assigner=random_source(modes=5, shape=(6,), seed=9))
    save_source(
        source, tmp_path / "source.safetensors", facts={"seed": 3}, data={"space": "pixels"}
    )
    # the file, or its folder
    for place in (tmp_path / "source.safetensors", tmp_path, str(tmp_path)):
        again = load_source(place)
        for mine, theirs in ((source, again), (source.assigner, again.assigner)):
            assert all(
                torch.equal(getattr(mine, n), getattr(theirs, n))
                for n in ("means", "std", "log_weights")
            )
    assert again.is_spherical == spherical
    metadata = read_source_metadata(tmp_path)
    assert metadata["config"] == {"num_modes": 5, "shape": [3, 4, 4], "assigner": [6]}
    assert (metadata["training"], metadata["data"]) == ({"seed": 3}, {"space": "pixels"})
    save_source(
        dataclasses.replace(source, assigner=None),
        tmp_path / "half.safetensors",
        dtype=torch.bfloat16,
    )
    half = load_source(tmp_path / "half.safetensors", dtype=None)
    assert half.means.dtype == torch.float32
    assert torch.equal(half.means, source.means.bfloat16().float())
    assert half.assigner is None


def test_files_that_are_no_source_are_refused(tmp_path):
    save_file(
        {"means": torch.ones(2, 2)},
        tmp_path / "other.safetensors",
        {"format": "gmflow-1", "model_class": "GMDiT"},
    )
    with pytest.raises(
        ValueError, match="holds a GMDiT in format gmflow-1, not a Gaussian-mixture source"
    ):
        load_source(tmp_path / "other.safetensors")
    (tmp_path / "source.pkl").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="pickle file"):
        load_source(tmp_path / "source.pkl")
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors"):
        load_source(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match=r"holds no source\.safetensors"):
        load_source(tmp_path)
    save_source(random_source(), tmp_path / "source.safetensors")
    raw = (tmp_path / "source.safetensors").read_bytes()
    (tmp_path / "source.safetensors").write_bytes(raw[:-9])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_source(tmp_path)


def test_errors_say_what_fits():
    source = random_source()
    with pytest.raises(
        ValueError,
        match=r"samples are \(3, 4, 4\), but the latents are \(4, 32, 32\).*fitted on data",
    ):
        source.require_shape((4, 32, 32))
    with pytest.raises(
        ValueError, match=r"modes between 1 and 5 do not fit a source of 5 modes; give 0 to 4"
    ):
        source.draw([1, 5])
    with pytest.raises(ValueError, match=r"modes between -1 and 0"):
        source.moments(torch.tensor([0, -1]))
    x = source.means.clone()
    x[[1, 3], 0, 0, 0] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(ValueError, match=r"rows 1, 3 of 5 are not finite"):
        source.responsibilities(x)
    with pytest.raises(ValueError, match=r"means of the modes 1, 3 are not finite"):
        GaussianMixtureSource(x, source.std, source.log_weights)
    means = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"weights add up to 3 instead of 1"):
        GaussianMixtureSource(means, torch.ones(3, 1), torch.zeros(3))
    with pytest.raises(ValueError, match=r"std \(1, 3\) does not broadcast"):
        GaussianMixtureSource(means, torch.ones(1, 3), torch.full((3,), 1 / 3).log())
    with pytest.raises(ValueError, match="not positive"):
        GaussianMixtureSource(means, torch.zeros(3, 1), torch.full((3,), 1 / 3).log())
    with pytest.raises(ValueError, match="assigner of 4 modes"):
        random_source(assigner=random_source(modes=4, shape=(6,)))


# Published mixtures


def write_pickle(folder, content, protocol=pickle.DEFAULT_PROTOCOL):
    path = folder / "mixture.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("kind", ["diag", "spherical"])
def test_scikit_learns_mixtures_convert(tmp_path, kind):
    from sklearn.mixture import GaussianMixture

    x = np.random.default_rng(0).normal(size=(200, 4))
    there = GaussianMixture(3, covariance_type=kind, random_state=np.random.RandomState(1)).fit(x)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        source = convert_pickle(write_pickle(tmp_path, {"model": [there]}, protocol))
        assert np.allclose(source.means, there.means_)
        assert np.allclose(source.std.square(), there.covariances_.reshape(3, -1))
        assert np.allclose(source.weights, there.weights_)
    assert np.allclose(
        source.responsibilities(torch.from_numpy(x)), there.predict_proba(x), atol=1e-5
    )
    full = GaussianMixture(3, random_state=0).fit(x)
    with pytest.raises(ValueError, match="covariances of the type 'full'"):
        convert_pickle(write_pickle(tmp_path, full))


def test_files_of_joblib_convert(tmp_path):
    joblib = pytest.importorskip("joblib")
    means = np.random.default_rng(0).normal(size=(3, 2, 4, 4)).astype(np.float32)
    joblib.dump(
        {"means": np.asfortranarray(means), "var": np.array([1.0, 4, 9]), "note": "x"},
        tmp_path / "mixture.pkl",
    )
    with pytest.raises(ValueError, match="no weights"):
        convert_pickle(tmp_path / "mixture.pkl")
    tokens = random_source(modes=3, shape=(5,))
    source = convert_pickle(tmp_path / "mixture.pkl", tokens)
    assert np.array_equal(source.means, means)
    assert source.std.flatten().tolist() == [1, 2, 3]
    assert source.is_spherical
    assert torch.equal(source.log_weights, tokens.log_weights)
    assert source.assigner is tokens


class Attack:
    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


def test_attacks_are_refused_and_do_nothing(tmp_path):
    marker = tmp_path / "marker"
    arrays = {"means": np.zeros((2, 3)), "var": np.ones(2), "weights": np.full(2, 0.5)}
    attacks = [
        Attack(os.system, f"touch {marker}"),
        Attack(builtins.eval, f"open({str(marker)!r}, 'w')"),
        Attack(builtins.open, str(marker), "w"),
        Attack(builtins.getattr, {}, "clear"),
        Attack(pickle.loads, pickle.dumps(Attack(os.mkdir, str(marker)))),
    ]
    for attack in attacks:
        with pytest.raises(
            ValueError, match=r"refused: it asks for Python's .* it may be an attack"
        ):
            convert_pickle(write_pickle(tmp_path, {**arrays, "more": attack}))
    harmless = Attack(np.testing.assert_equal, 1, 2)  # NumPy's: becomes a record, is not called
    assert convert_pickle(write_pickle(tmp_path, {**arrays, "more": harmless})).num_modes == 2
    assert not marker.exists()
    # this pickle would change a function of ours
    (tmp_path / "mixture.pkl").write_bytes(b"c_codecs\nencode\n}S'x'\nI1\nsb.")
    with pytest.raises(ValueError, match="refused: it changes a function"):
        convert_pickle(tmp_path / "mixture.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, r"holds no mixture: it has \['a'\]"),
        (
            {"means": np.array([["a"]], dtype=object), "var": np.ones(1)},
            r"has \['means', 'var'\], and",
        ),
        (
            {"means": np.zeros((2, 3)), "var": np.ones((2, 3, 3)), "weights": np.ones(2) / 2},
            r"variances \(2, 3, 3\)",
        ),
        (
            {"means": np.zeros((2, 3)), "var": np.ones(2), "weights": np.ones(2)},
            "add up to 2 instead of 1",
        ),
    ],
)
def test_pickles_without_a_mixture_say_what_they_hold(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        convert_pickle(write_pickle(tmp_path, content))


def test_broken_pickles_and_cycles(tmp_path):
    loop = {"means": None}
    loop["self"] = [loop]
    with pytest.raises(ValueError, match="holds no mixture"):
        convert_pickle(write_pickle(tmp_path, loop))
    raw = write_pickle(tmp_path, {"means": np.zeros((2, 3))}).read_bytes()
    for end in (3, len(raw) // 2, len(raw) - 1):
        (tmp_path / "mixture.pkl").write_bytes(raw[:end])
        with pytest.raises(ValueError, match="refused"):
            convert_pickle(tmp_path / "mixture.pkl")


def test_the_largest_uniform_number_is_a_mode_too():
    weights = torch.tensor([0.5, 0.5, 0.0]).log()  # the last is never drawn
    source = GaussianMixtureSource(torch.tensor([[0.0], [9.0], [20.0]]), torch.ones(3, 1), weights)
    ones = torch.ones(4)
    assert source.draw_modes(4, uniform=ones).tolist() == [1] * 4
    assert source.posterior_modes(torch.full((4, 1), 9.0), uniform=ones).tolist() == [1] * 4


def test_running_moments_of_one_mode_are_those_of_all_samples():
    """In float64, for values whose mean is far larger than their spread, whatever the batches."""
    x = 1000 + normal(50, 3, 2, 2) * torch.tensor([0.1, 1, 10]).view(3, 1, 1)
    moments = RunningMoments(1, (3, 2, 2), spherical=False, dtype=torch.float64)
    for part in x.split([7, 1, 30, 12]):
        moments.add(part, torch.zeros(len(part), dtype=torch.int64))
    var, mean = torch.var_mean(x.double(), 0, correction=0)
    assert moments.counts.tolist() == [50]
    torch.testing.assert_close(moments.means[0], mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.squares[0] / 50, var, rtol=1e-9, atol=0)
