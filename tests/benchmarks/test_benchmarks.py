"""Benchmarks: naive forms equal ours, statistics are right, and a tiny run writes its files."""

import json

import pytest
import torch

from gmflow_core import Guidance, flow_sigmas, sample_gm_ode, transition_nll
from gmflow_core.flow.losses import spectral_nll
from gmflow_core.flow.path import velocity_to_x0
from gmflow_core.gaussians.spectral import sample_with_spectrum
from gmflow_core.sampling.rollout import rollout
from tests.benchmarks import naive, report, source_fit
from tests.benchmarks.__main__ import command_of, main
from tests.benchmarks.measure import (
    extra_memory,
    floor,
    quartiles,
    ratios,
    relative_error,
    take_turns,
)
from tests.helpers import F64, is_near, normal, random_mixture

EXACT = 1e-9


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.9, 0.4)])
def test_naive_rollout(start, end):
    mixture, x = random_mixture(dtype=F64), normal(2, 3, 2, 3, dtype=F64)
    assert is_near(
        rollout(mixture, x, start, end, 7, method="plain"),
        naive.rollout(mixture, x, start, end, 7),
        EXACT,
    )


def test_naive_guided_gm_ode():
    velocities = [random_mixture(seed, batch=4, dtype=F64) for seed in range(3)]
    x, sigmas, replies = normal(2, 3, 2, 3, dtype=F64), flow_sigmas(3).tolist(), iter(velocities)

    def denoiser(x, sigma):
        cond, uncond = velocity_to_x0(
            next(replies), torch.cat([x, x]), torch.cat([sigma, sigma]).double()
        ).chunk(2)
        return Guidance(0.3)(cond, uncond.mean())

    ours = sample_gm_ode(denoiser, x, sigmas, order=2, substeps=4)
    assert is_near(
        ours, naive.guided_gm_ode(velocities, x, sigmas, 4, 0.3), 1e-6
    )  # ours holds the step's sigma in float32
    unguided = sample_gm_ode(
        lambda x, sigma: random_mixture(dtype=F64), x, sigmas, order=1, substeps=4
    )
    assert (ours - unguided).abs().max() > 0.1


def test_naive_transport():
    mixture, z = random_mixture(spread=0.7, dtype=F64), normal(2, 3, 2, 3, dtype=F64)
    axes = mixture.principal_axes()
    straight, power = axes.flatten(1, -3).squeeze(1), 0.3 * normal(2, 3, 2, 3, seed=2, dtype=F64)
    assert is_near(naive.principal_axes(mixture).abs(), straight.abs(), EXACT)
    x = naive.from_normal(mixture, z, straight, steps=100)
    assert is_near(mixture.from_normal(z, axes), x, EXACT)
    assert is_near(naive.to_normal(mixture, x, straight), z, 1e-5)
    ours, theirs = (
        sample_with_spectrum(mixture, power, z, axes),
        naive.sample_with_spectrum(mixture, power, z, straight),
    )
    assert is_near(ours, theirs, 1e-3)  # 16 steps of Newton's method


def test_naive_losses():
    velocity, x_high, noise = (
        random_mixture(dtype=F64),
        normal(2, 3, 2, 3, dtype=F64),
        normal(2, 3, 2, 3, seed=2, dtype=F64),
    )
    high = torch.tensor([0.9, 0.3], dtype=F64)
    given = (velocity, x_high + 0.3 * noise, x_high, 0.5 * high, high)
    assert is_near(naive.transition_nll(*given), transition_nll(*given), 1e-6)
    draw = velocity.from_normal(noise)
    assert is_near(
        naive.spectral_nll(velocity, draw, x_high), spectral_nll(velocity, draw, x_high), 1e-4
    )


def test_ratio_is_of_paired_repeats():
    assert quartiles([3.0]) == (3, 3, 3)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2, 3, 4)
    assert ratios([2.0, 40.0, 6.0], [1.0, 10.0, 2.0]) == (2.5, 3, 3.5)


def test_floor_is_what_takes_longest():
    rates = {"bytes_per_second": 10.0, "flops_per_second": 100.0}
    assert floor(rates, 20, 100) == {"seconds": 2, "bound": "memory", "bytes": 20, "flops": 100}
    assert floor(rates, 20, 1000)["bound"] == "arithmetic"
    assert floor(rates, 20, 1000)["seconds"] == 10


def test_extra_memory_is_the_peak():
    x = torch.ones(1 << 16)

    def two_at_once():
        first = x + 1
        second = first + 1
        del first
        return second * second  # beside `second`

    assert extra_memory(two_at_once, "cpu") == pytest.approx(2 * 4 * (1 << 16), rel=0.01)


def test_turns_and_errors():
    calls = []
    found = take_turns(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, "cpu", budget=0, least=3
    )
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3}
    warm = 6
    first = calls[warm:]
    assert first[0] == "a"
    assert first[-1] == "b"
    assert calls.count("a") > 3
    assert relative_error(torch.tensor([1.0, 4.5]), torch.tensor([1.0, 4.0], dtype=F64)) == 0.125


def test_tiny_run_writes_table_json_and_plots(tmp_path, capsys, monkeypatch):
    for variable in ("GMFLOW_PATH", "LAKONLAB_PATH", "PIFLOW_PATH"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    threads = torch.get_num_threads()
    arguments = [
        "--quick",
        "--no-compile",
        "--stock-malloc",
        "--threads",
        str(threads),
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    main([*arguments, "--only", "rollout", "substep", "growth", "guided"])
    results = json.loads((tmp_path / "benchmarks.json").read_text())
    assert results["command"].startswith("python -m tests.benchmarks --quick --no-compile")
    assert str(tmp_path) not in results["command"]
    assert results["machines"]["cpu"]["threads"] == threads
    assert {line["row"] for line in results["rows"]} == {
        "rollout",
        "substep",
        "growth",
        "guided steps",
    }
    line = results["rows"][0]
    ours, straight = line["forms"]["ours"], line["forms"]["naive"]
    assert ours["median"] == pytest.approx(quartiles(ours["seconds"])[1])
    assert ours["ratio"] == pytest.approx(ratios(straight["seconds"], ours["seconds"]))
    assert max(ours["error"], straight["error"]) < 1e-4
    assert line["forms"]["GMFlow"]["not_run"].startswith("not run: ")
    assert line["floor"]["seconds"] > 0
    for name in ("benchmarks.png", "benchmarks_growth.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    table = report.markdown(results)
    assert table in capsys.readouterr().out
    assert "| rollout: K = 8, C = 16, 12 x 10, batch 1, 32 substeps |" in table


@pytest.mark.parametrize("out", [[], ["--out", "a folder"], ["--out=x"], ["--ou", "x"]])
def test_the_recorded_command_has_no_folder(out):
    command = "python -m tests.benchmarks"
    assert command_of(out) == command
    arguments = ["--only", "rollout", "loss", *out, "--threads", "4"]
    assert command_of(arguments) == f"{command} --only rollout loss --threads 4"


def test_a_fits_memory_is_that_of_its_arithmetic():
    """Needs of ImageNet's source rest on that arithmetic."""
    start = source_fit.measure_start(*source_fit.START_SIZES[0], "cpu")
    latents = source_fit.measure_latents(16, (8, 8, 8), "cpu")
    assert 0.6 < start["ratio"] < 1.1
    assert 0.6 < latents["ratio"] < 1.1
    assert source_fit.full_size()["fits"]
