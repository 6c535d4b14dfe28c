"""2-D experiments on the mixture source, and the 2-D network with labels."""

import csv
import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from gmflow_core import GaussianMixture
from gmflow_core.files.checkpoint import load_checkpoint, read_metadata, save_checkpoint
from gmflow_core.models.mlp import GMFlowMLP, GMFlowMLPConfig
from gmflow_core.source.em import fit_mixture
from tests.helpers import is_near, normal
from training import source_toys as source_toys_command
from training.experiments import source_toys, source_toys_networks
from training.experiments.source_toys import (
    PRESETS,
    Run,
    draw_data,
    loss_of,
    sample,
    sliced_wasserstein,
)
from training.experiments.source_toys_networks import FIT_TOLERANCE, likeliest_fit

RESULTS = Path(__file__).parents[2] / "docs/results/source_toys.json"
TINY = ["--preset", "quick", "--iterations", "3", "--samples", "200"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def source():
    return fit_mixture(draw_data("checkerboard", 20_000, generator()), 8, spherical=True).source


def test_the_distance_has_its_closed_forms():
    x = normal(20_000, 2)
    assert sliced_wasserstein(x, x.flip(0)) < 1e-7
    assert sliced_wasserstein(x, x + torch.tensor([0.3, 0.4])) == pytest.approx(
        0.5 * 2 / math.pi, rel=1e-3
    )
    assert sliced_wasserstein(x, torch.zeros_like(x)) == pytest.approx(
        math.sqrt(2 / math.pi), rel=0.01
    )
    assert sliced_wasserstein(x, 2 * x) == pytest.approx(math.sqrt(2 / math.pi), rel=0.01)


@pytest.mark.parametrize(("toy", "distance"), [("checkerboard", 0.132), ("8-gaussians", 0.245)])
def test_the_data_have_unit_variance_and_a_known_distance_to_noise(toy, distance):
    x = draw_data(toy, 20_000, generator())
    assert (x.std(0) - 1).abs().max() < 0.015
    assert sliced_wasserstein(normal(20_000, 2), x) == pytest.approx(distance, abs=0.015)


def test_the_coupling_decides_how_far_a_point_travels(source):
    """Against u = 0 the loss is half the mean of |noise - x_0|^2."""
    x0, spread = (
        draw_data("checkerboard", 20_000, generator()),
        2 * (source.weights @ source.std.square()).item(),
    )

    def still(x, sigma, labels=None):
        zeros = x.new_zeros(len(x), 1, 1)
        return GaussianMixture(x.new_zeros(len(x), 1, 2), zeros, zeros)

    loss = {
        noise: loss_of(still, Run("checkerboard", noise, 8), source, x0, generator(1)).item()
        for noise in source_toys.SOURCES
    }
    assert loss["gaussian"] == pytest.approx(2, rel=0.03)
    assert loss["independent"] == pytest.approx(2, rel=0.03)
    assert loss["mode"] == pytest.approx(spread, rel=0.03)
    modes_std = source.std[source.posterior_modes(x0)]
    # in the frame the same error counts as much, but for the units of the density
    assert loss["known"] == pytest.approx(
        loss["mode"] - 2 * modes_std.log().mean().item(), rel=1e-2
    )


def test_zero_calls_give_the_source_itself(source):
    x = sample(None, Run("checkerboard", "gaussian"), None, 20_000, "", 0, seed=3)
    assert (x.std(0) - 1).abs().max() < 0.02
    for noise in ("mode", "known"):
        x = sample(None, Run("checkerboard", noise, 8), source, 20_000, "", 0, seed=3)
        assert sliced_wasserstein(x, source.sample(20_000, generator(1))[0]) < 0.02


def test_the_likeliest_of_several_starts_is_taken():
    x = draw_data("8-gaussians", 2000, generator(1))
    fits = [fit_mixture(x, 4, spherical=True, seed=seed) for seed in range(1, 6)]
    source, ends = likeliest_fit(x, 4, seed=1, starts=5)
    assert ends == [fit.log_likelihoods[-1] for fit in fits]
    best = ends.index(max(ends))
    assert ends[0] < ends[best] - 0.01
    assert torch.equal(source.means, fits[best].source.means)
    # all starts find the 8 modes, and the first is as good as any
    source, ends = likeliest_fit(x, 8, seed=1, starts=3)
    assert max(ends) - min(ends) < FIT_TOLERANCE
    assert torch.equal(source.means, fit_mixture(x, 8, spherical=True, seed=1).source.means)


def test_a_run_is_written_kept_and_taken_up(tmp_path, monkeypatch):
    out = tmp_path / "toys"
    arguments, trained = [*TINY, "--out", str(out)], []
    train = source_toys_networks.train

    def interrupted(network, run, *rest):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(run)
        train(network, run, *rest)

    monkeypatch.setattr(source_toys_networks, "train", interrupted)
    with pytest.raises(SystemExit) as stopped:
        source_toys_command.main(arguments)
    assert stopped.value.code == 130
    monkeypatch.setattr(
        source_toys_networks,
        "train",
        lambda network, run, *rest: (trained.append(run), train(network, run, *rest)),
    )
    source_toys_command.main(arguments)
    assert len(trained) == len(set(trained)) == 11
    figures = (out / "source_toys.csv").read_text()
    source_toys_command.main(arguments)
    assert len(trained) == 11
    assert (out / "source_toys.csv").read_text() == figures

    lines = list(csv.DictReader(figures.splitlines()))
    found = {(line["solver"], line["calls"]) for line in lines if line["output"] == "mixture"}
    assert found == {("", "0"), *itertools.product(("gm-ode", "gm-sde"), "1248")}
    assert {(line["data"], line["source"], line["modes"]) for line in lines} == {
        ("checkerboard", "N(0, I)", "1"),
        ("checkerboard", "mixture", "8"),
        ("8-gaussians", "N(0, I)", "1"),
        ("8-gaussians", "mixture", "4"),
        ("8-gaussians", "mixture", "8"),
    }
    assert all(math.isfinite(float(line["sliced_w1"])) for line in lines)
    assert (out / "source_toys.md").read_text().count("\n") == 2 + 8 + 1 + 2 + 6
    for name in ("source_toys.png", "source_toys_corners.png"):
        assert (out / name).stat().st_size > 10_000
    told = read_metadata(out / "checkerboard_known8_mixture_0.safetensors")["data"]["source"]
    assert told == {"num_modes": 8, "shape": [2], "coupling": "soft", "conditioning": "mode"}
    with pytest.raises(SystemExit, match=r"iterations 3 there, 4 asked for.*--restart"):
        source_toys_command.main([*arguments, "--iterations", "4"])
    with pytest.raises(SystemExit, match="starts 2 there, 3 asked for"):
        source_toys_command.main([*arguments, "--starts", "3"])


def test_settings_out_of_range_are_quoted():
    with pytest.raises(ValueError, match="--seeds is 0; it must be at least 1"):
        dataclasses.replace(PRESETS["quick"], seeds=0)


def test_the_published_figures_show_what_a_mixture_source_must():
    """A mixture source with 8 modes halves the Gaussian source's distance at 2 and 4 steps.

    At the end the distance is below that of the source itself.
    """
    lines = json.loads(RESULTS.read_text())["lines"]
    names = ("data", "modes", "coupling", "output", "calls")
    w1 = {tuple(line[name] for name in names): line["sliced_w1"] for line in lines}
    for toy, sizes in source_toys.MODES.items():
        for calls in (2, 4):
            assert w1[toy, 8, "mode", "mean", calls] <= 0.5 * w1[toy, 1, "none", "mean", calls]
        for modes in sizes:
            assert all(
                w1[toy, modes, "mode", "mean", n] < w1[toy, 1, "none", "mean", n] for n in (1, 2, 4)
            )
    for toy, modes in (("checkerboard", 8), ("8-gaussians", 4)):
        assert w1[toy, modes, "mode", "mean", 16] < w1[toy, modes, "mode", "mean", 0]


def test_a_network_that_knows_labels(tmp_path):
    torch.manual_seed(0)
    network = GMFlowMLP(
        GMFlowMLPConfig(num_components=2, embed_dim=8, hidden_dim=16, num_layers=2, num_classes=3)
    )
    x, labels = normal(3, 2, 4, 5), torch.tensor([2, 0, 1])
    with torch.no_grad():
        mixture = network(x, torch.tensor([0.2, 0.5, 0.9]), labels)
        assert mixture.means.shape == (3, 2, 2, 4, 5)
        one = network(x[1:2], 0.5, labels[1:2])
        assert is_near(one.means, mixture.means[1:2], 1e-5)
        assert (network(x[1:2], 0.5, labels[:1]).means - one.means).abs().max() > 0.01
        save_checkpoint(network, tmp_path / "network.safetensors")
        assert torch.equal(
            load_checkpoint(tmp_path / "network.safetensors")[0](x[1:2], 0.5, labels[1:2]).means,
            one.means,
        )
    with pytest.raises(ValueError, match="knows 3 labels, but no labels came"):
        network(x, 0.5)
    with pytest.raises(ValueError, match="knows 0 labels, but labels came"):
        GMFlowMLP(GMFlowMLPConfig(num_components=1, embed_dim=4, hidden_dim=4, num_layers=1))(
            x, 0.5, labels
        )
    with pytest.raises(ValueError, match="num_classes is -1"):
        GMFlowMLPConfig(num_classes=-1)
