"""Machine forms against the plain ones: tiles, compiled functions, quantiles, fallbacks."""

import importlib.util
import logging
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gmflow_core import (
    GaussianMixture,
    flow_sigmas,
    rollout,
    sample_gm_ode,
    sample_gm_sde,
    sample_with_spectrum,
)
from gmflow_core.fast import choice, compiling, quantiles, tiled, tiled_few_kernels
from gmflow_core.gaussians.quantile import mixture_quantile
from gmflow_core.gaussians.transport import AxisMap, weights_given
from gmflow_core.sampling.denoisers import class_denoiser
from gmflow_core.sampling.guidance import Guidance
from tests.helpers import F64, cast, is_near, normal, random_mixture

NO_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def compiled_method(monkeypatch):
    monkeypatch.setenv("GMFLOW_METHOD", "compiled")
    compiling.declined.clear()
    compiling.log_once.cache_clear()


class Network:
    """One velocity mixture for every class and time, and twice its means for no class."""

    class config:
        num_classes = 1

    def __init__(self, velocity):
        self.velocity = velocity

    def __call__(self, x, sigma, labels):
        factor = (1 + labels.to(x.dtype)).reshape(-1, *[1] * x.ndim)
        fields = vars(self.velocity).values()
        means, *others = (torch.cat([each] * (len(x) // len(each))) for each in fields)
        return GaussianMixture(factor * means, *others)


def guided_sample(velocity, x, weight):
    denoiser = class_denoiser(
        Network(velocity), torch.zeros(len(x), dtype=torch.int64), Guidance(weight)
    )
    return sample_gm_ode(denoiser, x, flow_sigmas(4), order=2, substeps=2).double()


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7),
    reason="torch 2.6 cannot compile guided steps; the plain form takes their place",
)
@NO_COMPILER
def test_compiled_guided_steps_equal_the_definition(monkeypatch):
    velocity, x = random_mixture(channels=2, dtype=F64), normal(2, 2, 2, 3, dtype=F64)
    with monkeypatch.context() as patch:
        patch.delenv("GMFLOW_METHOD")
        expected = {weight: guided_sample(velocity, x, weight) for weight in (0.2, 0.4)}
    velocity, x = cast(velocity, torch.float32), x.float()
    for weight in (0.4, 0.2):
        assert is_near(guided_sample(velocity, x, weight), expected[weight], 2e-5)
    assert not compiling.declined


@NO_COMPILER
@pytest.mark.parametrize("size", [(12, 3), (3, 4)])  # components and channels: r, or coordinates
def test_compiled_tiles_equal_the_definition(size):
    mixture = random_mixture(components=size[0], channels=size[1])
    x = normal(2, size[1], 2, 3)
    expected = rollout(mixture, x, 0.9, 0.1, 5, method="plain")
    assert is_near(rollout(mixture, x, 0.9, 0.1, 5), expected, 5e-6)
    assert not compiling.declined


@pytest.mark.parametrize("size", [(1, 3), (5, 3), (3, 4)])  # r, r, coordinates
@pytest.mark.parametrize("per_pixel", [False, True])
def test_tiles_of_few_kernels_equal_the_definition(size, per_pixel):
    mixture = random_mixture(components=size[0], channels=size[1], dtype=F64)
    x, sigmas = normal(2, size[1], 2, 3, dtype=F64), (0.9, 0.1)
    if per_pixel:
        start = normal(2, 1, 2, 3, seed=4, dtype=F64).sigmoid()
        sigmas = start, start * normal(2, 1, 2, 3, seed=5, dtype=F64).sigmoid()
    expected = rollout(mixture, x, *sigmas, 20, method="plain")
    form = tiled_few_kernels.FEW_KERNELS
    found = tiled.rollout_in_tiles(mixture, x, *sigmas, 20, 1.0, None, form)
    assert is_near(found, expected, 1e-11)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("wrong", ["nothing", "all", "last sample", "last pixel", "nan"])
def test_a_kernel_with_wrong_numbers_is_left_and_the_log_says_so_once(wrong, monkeypatch, caplog):
    from gmflow_core.fast import triton_kernel

    mixture, x = random_mixture(space=(20, 20)), normal(2, 3, 20, 20)  # more pixels than it checks
    expected, calls = rollout(mixture, x, 0.9, 0.1, 5, method="plain"), []
    made = expected.clone()
    where = {"all": ..., "last sample": 1, "last pixel": (1, 0, 19, 19), "nan": (0, 0, 0, 0)}
    if wrong in where:
        made[where[wrong]] = torch.nan if wrong == "nan" else 9.0
    monkeypatch.setattr(triton_kernel, "rollout_in_one_kernel", lambda *_: calls.append(1) or made)
    monkeypatch.setattr(choice, "_checked", set())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert is_near(rollout(mixture, x, 0.9, 0.1, 5, method="triton"), expected, 1e-5)
    assert len(calls) == (3 if wrong == "nothing" else 1)
    assert len(caplog.records) == (wrong != "nothing")
    assert wrong == "nothing" or "differ from the definition's" in caplog.text
    if wrong == "nothing":  # tensors of sigmas are another kind of call, checked on its own
        made[...] = 9.0
        sigmas = torch.tensor([0.9, 0.9]), torch.tensor([0.1, 0.1])
        assert is_near(rollout(mixture, x, *sigmas, 5, method="triton"), expected, 1e-5)


@pytest.mark.parametrize("by_argument", [False, True])
def test_few_substeps_compile_by_argument_or_by_the_environment(by_argument, monkeypatch):
    compiled, mixture = [], random_mixture().as_tilted()
    monkeypatch.setattr(choice, "_compiled_once", lambda f: compiled.append(f.__name__) or f)
    if by_argument:
        monkeypatch.delenv("GMFLOW_METHOD")
    method = "compiled" if by_argument else None
    rollout(mixture, normal(2, 3, 2, 3), 0.9, 0.1, 3, method=method)
    assert compiled == ["follow"]


@NO_COMPILER
def test_compiled_draws_equal_the_definition(monkeypatch):
    monkeypatch.setattr(quantiles, "STEPS", 1)  # of one call: more compile longer
    mixture = random_mixture(1, 200, 4, 2, (), spread=2.0, dtype=F64)
    z = 1.5 * normal(200, 2, dtype=F64)
    axes = mixture.principal_axes()
    form = choice.axis_map(z.device)
    assert is_near(mixture.from_normal(z, axes, form), mixture.from_normal(z, axes), 1e-9)
    assert not compiling.declined


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_quantiles_by_sections_equal_the_definition(dtype):
    means, log_weights = 3 * normal(2, 4, 50, dtype=dtype), normal(2, 4, 50, seed=2, dtype=dtype)
    std, z = torch.full((1, 1, 1), 0.5, dtype=dtype), 2 * normal(2, 50, seed=3, dtype=dtype)
    expected = mixture_quantile(means, std, log_weights, z)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    assert is_near(quantiles.quantile_by_sections(means, std, log_weights, z), expected, tolerance)


def test_polynomials_for_exp2_and_erfc():
    x = torch.linspace(-126, 127, 20001)
    assert ((quantiles.exp2_by_polynomial(x).double() / x.double().exp2() - 1).abs() < 1.5e-7).all()
    assert quantiles.exp2_by_polynomial(torch.zeros(1)) == 1
    x = torch.linspace(-9, 9, 20001, dtype=F64)
    found = quantiles.erfc_by_polynomial(x.float(), (-x * x).exp().float()).double()
    normal_numbers = x < 8.9
    assert ((found / torch.erfc(x) - 1).abs()[normal_numbers] < 6e-7).all()
    exact = quantiles.erfc_by_polynomial(x, (-x * x).exp())
    assert ((exact / torch.erfc(x) - 1).abs() < 3e-8).all()


def test_gradients_take_the_definition(monkeypatch):
    monkeypatch.setattr(choice, "compiled", lambda function: pytest.fail("compiled"))
    mixture, x = random_mixture(), normal(2, 3, 2, 3).requires_grad_()
    for mixture in (random_mixture(), random_mixture().as_tilted()):
        rollout(mixture, x, 0.9, 0.1, 5).sum().backward()
    assert x.grad.isfinite().all()


def no_compiler(function, **options):
    def run(*arguments):
        raise RuntimeError("no C++ compiler was found")

    return run


def test_where_nothing_compiles_the_plain_forms_run_and_the_log_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(quantiles, "_start", compiling.compiled(quantiles._start))
    monkeypatch.setattr(choice, "_compiled_form", choice._compiled_form.__wrapped__)
    monkeypatch.setattr(choice, "_compiled_once", compiling.compiled)
    mixture, x = random_mixture(), normal(2, 3, 2, 3)
    spectrum = torch.zeros_like
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for substeps in (2, 6):
                expected = rollout(mixture, x, 1.0, 0.0, substeps, method="tiled")
                assert is_near(rollout(mixture, x, 1.0, 0.0, substeps), expected, 1e-5)
            noise = torch.Generator().manual_seed(0)
            sample_gm_sde(
                lambda x, sigma: mixture,
                x,
                flow_sigmas(2),
                spectrum=lambda gaussian: spectrum(gaussian.mean),
                noise=noise,
            )
    reason = "(RuntimeError: no C++ compiler was found)"
    plain, tiles = "the plain form takes its place", "tiles do the same"
    assert [record.message for record in caplog.records] == [
        f"GMFlow: {what} {reason}; {instead}"
        for what, instead in (
            ("follow is not compiled", plain),
            ("no rollout by torch.compile", tiles),
            ("no compiled quantiles", plain),
            ("weights_given is not compiled", plain),
        )
    ]


class Kernels(TorchDispatchMode):
    """Counts the operations that launch a kernel on a GPU: all but views and questions."""

    NONE = ("aten._unsafe_view", "aten.promote_types")
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view and str(function.overloadpacket) not in self.NONE
        return function(*args, **(kwargs or {}))


def test_the_forms_for_a_gpu_launch_few_kernels():
    """The forms for a CPU launch more: tiles with loops over rows some 700."""
    mixture, x = random_mixture(components=8, channels=16), normal(2, 16, 2, 3)
    form = tiled_few_kernels.FEW_KERNELS
    with Kernels() as kernels:
        tiled.rollout_in_tiles(mixture, x, 0.9, 0.4, 32, 1.0, None, form)
    assert 100 < kernels.count <= 300
    mixture, z = random_mixture(components=8, channels=4), normal(2, 4, 2, 3)
    by_sections = AxisMap(quantiles.quantile_by_sections, weights_given)
    with Kernels() as kernels:
        sample_with_spectrum(mixture, 0.1 * z, z, None, by_sections)
    assert 100 < kernels.count <= 600
