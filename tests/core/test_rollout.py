"""Rollouts against a slow, obvious one: a float64 loop over pixels, posteriors by Bayes' rule."""

import importlib.util
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gmflow_core import GaussianMixture, rollout
from gmflow_core.fast import choice, compiling, tiled
from tests.helpers import F64, SPACES, cast, is_near, normal, random_mixture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[2]
NO_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton (Linux)"
)


def is_newer_triton() -> bool:
    return bool(importlib.util.find_spec("triton") and importlib.util.find_spec("triton.knobs"))


METHODS = ["plain", "tiled", pytest.param("triton", marks=NO_TRITON)]


@pytest.fixture(autouse=True)
def tiles_of_a_few_pixels_and_no_silent_fallback(monkeypatch):
    monkeypatch.setattr(tiled, "TILE", {"cpu": 20, "gpu": 20})
    monkeypatch.setattr(
        choice, "decline", lambda kind, what, error, instead="": pytest.fail(f"{what}: {error}")
    )
    compiling.declined.clear()


def same_way(method, mixture, x, *args, **options):
    """A rollout in float32 on the device where that method is at home, as float64 on the CPU."""
    device = DEVICE if method == "triton" else "cpu"
    args = [
        each.to(device, torch.float32) if isinstance(each, torch.Tensor) else each for each in args
    ]
    mixture = cast(mixture, torch.float32).to(device)
    return rollout(mixture, x.float().to(device), *args, **options, method=method).double().cpu()


def posterior_mean_of_a_pixel(means, log_weights, var, x_src, s_src, x, s):
    """Return E[x_0] by Bayes' rule; x and the means are lists over C.

    The density is sum_k w_k N(mean_k, var) N(x; (1 - s) x_0, s^2) / N(x_src; (1 - s_src) x_0,
    s_src^2).
    """
    precision = 1 / var + ((1 - s) / s) ** 2 - ((1 - s_src) / s_src) ** 2
    shift = [(1 - s) * b / s**2 - (1 - s_src) * a / s_src**2 for a, b in zip(x_src, x, strict=True)]
    centres, scores = [], []
    for mean, log_weight in zip(means, log_weights, strict=True):
        natural = [m / var + h for m, h in zip(mean, shift, strict=True)]
        centres.append([n / precision for n in natural])
        scores.append(
            log_weight
            + sum(n * n / precision - m * m / var for n, m in zip(natural, mean, strict=True)) / 2
        )
    shares = [math.exp(score - max(scores)) for score in scores]
    return [
        sum(w * c for w, c in zip(shares, column, strict=True)) / sum(shares)
        for column in zip(*centres, strict=True)
    ]


def slow_rollout(mixture, x, sigma, sigma_end, substeps, constrain=None):
    """sigma, sigma_end: one for each pixel, (B, 1, *S)."""
    space = x.shape[2:]
    means, log_weights = (
        t.reshape(*t.shape[:3], -1) for t in (mixture.means, mixture.log_weights)
    )  # (B, K, C or 1, pixels)
    var = mixture.var.expand(x.shape[0], 1, 1, *space).reshape(x.shape[0], -1)
    start, end = (
        s.to(F64).expand(x.shape[0], 1, *space).reshape(x.shape[0], -1) for s in (sigma, sigma_end)
    )
    flat, out = x.double().reshape(*x.shape[:2], -1), x.double().reshape(*x.shape[:2], -1).clone()
    for b in range(flat.shape[0]):
        for p in range(flat.shape[2]):
            s_src, s_end = start[b, p].item(), end[b, p].item()
            parts = means[b, :, :, p].tolist(), log_weights[b, :, 0, p].tolist(), var[b, p].item()
            x_src = now = flat[b, :, p].tolist()
            for step in range(substeps):
                s, following = (s_src + (s_end - s_src) * i / substeps for i in (step, step + 1))
                mean = posterior_mean_of_a_pixel(*parts, x_src, s_src, now, s)
                now = [
                    value + (following - s) * (value - m) / s
                    for value, m in zip(now, mean, strict=True)
                ]
                now = [constrain(value) for value in now] if constrain else now
            out[b, :, p] = torch.tensor(now, dtype=F64)
    return out.reshape(x.shape)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("space", [*SPACES, (1, 7)])
@pytest.mark.parametrize(
    "size", [(1, 3), (5, 3), (3, 4)]
)  # components and channels: of the last the Gram matrix is taken
@pytest.mark.parametrize(
    ("sigma", "sigma_end", "substeps"), [(1.0, 0.0, 7), (0.3, 0.0, 1), (0.05, 0.04, 16)]
)
def test_rollout_agrees_with_the_slow_loop(method, space, size, sigma, sigma_end, substeps):
    components, channels = size
    mixture = random_mixture(
        batch=3, components=components, channels=channels, space=space, dtype=F64
    )
    x = normal(3, channels, *space, dtype=F64)
    ones = torch.ones(3, 1, *space, dtype=F64)
    expected = slow_rollout(mixture, x, sigma * ones, sigma_end * ones, substeps)
    if method != "triton":
        assert is_near(
            rollout(mixture, x, sigma, sigma_end, substeps, method=method), expected, 1e-11
        )
    assert is_near(same_way(method, mixture, x, sigma, sigma_end, substeps), expected, 3e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("per_pixel", [False, True])
@pytest.mark.parametrize("substeps", [2, 15])
def test_every_sample_or_pixel_may_have_its_own_sigmas_and_variance(method, per_pixel, substeps):
    mixture, x = random_mixture(dtype=F64), normal(2, 3, 2, 3, dtype=F64)
    if per_pixel:
        log_std = normal(2, 1, 1, 2, 3, dtype=F64) - 1
        mixture = GaussianMixture(mixture.means, mixture.log_weights, log_std)
        start = 0.5 + 0.5 * normal(2, 1, 2, 3, seed=4, dtype=F64).sigmoid()
        end = start * normal(2, 1, 2, 3, seed=5, dtype=F64).sigmoid()
        given = start, end
    else:
        start, end = (
            torch.tensor(s, dtype=F64).reshape(2, 1, 1, 1) for s in ([1.0, 0.4], [0.5, 0.0])
        )
        given = start.flatten(), end.flatten()
    expected = slow_rollout(mixture, x, start, end, substeps)
    if method != "triton":
        assert is_near(rollout(mixture, x, *given, substeps, method=method), expected, 1e-11)
    assert is_near(same_way(method, mixture, x, *given, substeps), expected, 3e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("components", [3, 6])
@pytest.mark.parametrize("log_std", [-8.0, -20.0])
def test_nearly_certain_components_act_as_atoms(method, components, log_std):
    """Without variance the posterior keeps the means and weighs them by the likelihood of x."""
    mixture, x = (
        random_mixture(seed=2, components=components, dtype=F64),
        normal(2, 3, 2, 3, dtype=F64),
    )
    mixture = GaussianMixture(
        mixture.means, mixture.log_weights, torch.full_like(mixture.log_std, log_std)
    )
    expected = x
    for sigma in (1.0, 0.75, 0.5, 0.25):
        distance = (
            (expected.unsqueeze(1) - (1 - sigma) * mixture.means).square().sum(2, keepdim=True)
        )
        shares = (mixture.log_weights - 0.5 * distance / sigma**2).softmax(1)
        expected = expected - 0.25 * (expected - (shares * mixture.means).sum(1)) / sigma
    if method != "triton":
        assert is_near(
            rollout(mixture, x, 1.0, 0.0, 4, method=method),
            expected,
            10 * math.exp(2 * log_std) + 1e-12,
        )
    assert is_near(same_way(method, mixture, x, 1.0, 0.0, 4), expected, 5e-6)


@NO_TRITON
@pytest.mark.skipif(not is_newer_triton(), reason="needs Triton 3.4, to find its cuobjdump")
def test_the_kernel_compiles_and_keeps_a_pixel_in_registers(tmp_path):
    """For GPUs that need not be there: of compute capability 8.0 and 9.0."""
    source = """
import re, subprocess
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from gmflow_core.fast.triton_kernel import _kernel
for K, C, columns, gram in ((8, 16, 8, True), (8, 4, 4, False)):
    sizes = dict(K=K, C=C, ROWS=8, COLUMNS=columns, GRAM=gram, NUMBERS=True, PER_PIXEL=False)
    sizes["BLOCK"] = 32
    types = dict.fromkeys(_kernel.arg_names, "*fp32")
    types |= dict.fromkeys(("start", "end", "shift"), "fp32")
    types |= dict.fromkeys(("substeps", "count", "pixels"), "i32")
    types |= dict.fromkeys(sizes, "constexpr")
    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        made = compile(ASTSource(_kernel, types, sizes), target, dict(num_warps=1))
        with open("kernel.cubin", "wb") as file:
            file.write(made.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        print(*re.findall("(?:STACK|SHARED|LOCAL):[0-9]+", said.stdout + said.stderr)[-3:])
"""
    done = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["STACK:0 SHARED:0 LOCAL:0"] * 4, done.stderr[-3000:]


@NO_TRITON
def test_mixtures_that_do_not_fit_a_thread_are_told_once(monkeypatch, caplog):
    monkeypatch.undo()
    compiling.log_once.cache_clear()
    mixture, x = random_mixture(components=64), normal(2, 3, 2, 3)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(
                rollout(mixture, x, 1.0, 0.0, 3, method="triton"), rollout(mixture, x, 1.0, 0.0, 3)
            )
    assert len(caplog.records) == 1
    assert "K = 64, C = 3 in torch.float32 does not fit" in caplog.text
    with pytest.raises(
        ValueError, match="sigma of shape"
    ):  # the caller's mistake is no fault of the kernel's
        rollout(random_mixture(), x, torch.ones(5), 0.0, 3, method="triton")


@pytest.mark.parametrize("method", METHODS)
def test_wide_components_beside_a_small_sigma_keep_their_digits(method):
    mixture, x = random_mixture(seed=3, dtype=F64), normal(2, 3, 2, 3, dtype=F64)
    mixture = GaussianMixture(
        mixture.means, mixture.log_weights, torch.full_like(mixture.log_std, 3.0)
    )
    ones = torch.ones(2, 1, 2, 3, dtype=F64)
    assert is_near(
        same_way(method, mixture, x, 0.02, 0.005, 3),
        slow_rollout(mixture, x, 0.02 * ones, 0.005 * ones, 3),
        5e-6,
    )


def test_very_wide_components_beside_a_tiny_sigma_in_double_precision():
    mixture, x = random_mixture(seed=3, dtype=F64), normal(2, 3, 2, 3, dtype=F64)
    mixture = GaussianMixture(
        mixture.means, mixture.log_weights, torch.full_like(mixture.log_std, math.log(1e3))
    )
    expected = rollout(mixture, x, 1e-4, 1e-5, 50, method="plain")
    assert is_near(rollout(mixture, x, 1e-4, 1e-5, 50, method="tiled"), expected, 1e-9)


@pytest.mark.parametrize("method", ["plain", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_x_is_computed_in_single(method, dtype):
    mixture, x = random_mixture(), normal(2, 3, 2, 3).to(dtype)
    mixture = GaussianMixture(mixture.means, mixture.log_weights, mixture.log_std - 2)
    for sigma in (0.1, torch.tensor([0.1])):
        expected = rollout(mixture, x.float(), sigma, 0.0, 6, method="plain")
        assert is_near(rollout(mixture, x, sigma, 0.0, 6, method=method), expected, 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_stays_one(method):
    mixture = random_mixture(batch=2)
    none = GaussianMixture(mixture.means[:0], mixture.log_weights[:0], mixture.log_std[:0])
    assert rollout(none, torch.zeros(0, 3, 2, 3), 1.0, 0.0, 3, method=method).shape == (0, 3, 2, 3)


def test_gradients_are_those_of_the_definition():
    mixture, x = random_mixture(dtype=F64), normal(2, 3, 2, 3, dtype=F64).requires_grad_()
    means, log_weights, log_std = (
        each.requires_grad_() for each in (mixture.means, mixture.log_weights, mixture.log_std)
    )
    assert torch.autograd.gradcheck(
        lambda *parts: rollout(GaussianMixture(*parts[:3]), parts[3], 0.9, 0.2, 3),
        (means, log_weights, log_std, x),
    )


def test_the_method_is_chosen_and_falls_back(monkeypatch, caplog):
    mixture, x, taken = random_mixture(), normal(2, 3, 2, 3), []
    tiles = tiled.rollout_in_tiles
    monkeypatch.setattr(tiled, "rollout_in_tiles", lambda *args: taken.append(1) or tiles(*args))
    expected = rollout(mixture, x, 1.0, 0.0, 3)
    monkeypatch.setenv("GMFLOW_METHOD", "plain")
    rollout(mixture, x, 1.0, 0.0, 3)
    assert len(taken) == 1  # the definition is not in tiles
    monkeypatch.setenv("GMFLOW_METHOD", "fast")
    with pytest.raises(ValueError, match=r"'fast'.*GMFLOW_METHOD.*plain, tiled, compiled, triton"):
        rollout(mixture, x, 1.0, 0.0, 3)
    monkeypatch.undo()
    monkeypatch.setitem(
        sys.modules, "gmflow_core.fast.triton_kernel", None
    )  # as if it could not be imported
    compiling.declined.clear()
    compiling.log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(
            rollout(mixture, x, 1.0, 0.0, 3, method="triton"),
            rollout(mixture, x, 1.0, 0.0, 3, method="triton"),
        )
    assert is_near(rollout(mixture, x, 1.0, 0.0, 3, method="triton"), expected)
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "GMFlow: no rollout by Triton"
    ]


@pytest.mark.parametrize("method", ["plain", "tiled"])
def test_check_ends_a_rollout_soon(method):
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        rollout(random_mixture(), normal(2, 3, 2, 3), 1.0, 0.0, 1000, check=check, method=method)


def test_constrain_acts_after_every_substep():
    mixture, x, sigmas = random_mixture(dtype=F64), normal(2, 3, 2, 3, dtype=F64), []

    def constrain(x, sigma):
        sigmas.append(sigma.unique().item())
        return x.clamp(-0.3, 0.3)

    ones = torch.ones(2, 1, 2, 3, dtype=F64)
    expected = slow_rollout(
        mixture, x, 0.9 * ones, 0.1 * ones, 4, constrain=lambda value: min(max(value, -0.3), 0.3)
    )
    assert is_near(rollout(mixture, x, 0.9, 0.1, 4, constrain=constrain), expected, 1e-12)
    assert sigmas == pytest.approx([0.7, 0.5, 0.3, 0.1])


def test_rollout_leaves_its_arguments_alone_and_refuses_no_substeps():
    mixture, x = random_mixture(), normal(2, 3, 2, 3)
    copies = [t.clone() for t in (x, mixture.means, mixture.log_weights, mixture.log_std)]
    rollout(mixture, x, 1.0, 0.0, 3)
    assert all(
        torch.equal(*pair)
        for pair in zip(
            copies, (x, mixture.means, mixture.log_weights, mixture.log_std), strict=True
        )
    )
    for substeps in (0, 2.5):
        with pytest.raises(ValueError, match=f"substeps is {substeps}"):
            rollout(mixture, x, 1.0, 0.0, substeps)


def test_an_unknown_method_is_refused_where_the_definition_runs_anyway():
    with pytest.raises(ValueError, match="method 'bogus'"):
        rollout(random_mixture(), normal(2, 3, 2, 3), 0.9, 0.1, 4, constrain=max, method="bogus")
