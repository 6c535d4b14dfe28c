"""What torch.compile makes of the functions that are marked for it, against the same functions as they stand."""

import logging
import shutil

import pytest
import torch

from gmflow_core import GaussianMixture, flow_sigmas, sample_gm_ode, sample_gm_sde
from gmflow_core.fast import compiling as fusing
from gmflow_core.gaussians import quantile as transport
from gmflow_core.sampling.denoisers import class_denoiser
from gmflow_core.sampling.guidance import Guidance
from tests.helpers import F64, cast, is_near, normal, random_mixture

NO_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet(monkeypatch):
    monkeypatch.setenv("GMFLOW_METHOD", "compiled")
    monkeypatch.setattr(fusing, "_programs", {})
    monkeypatch.setattr(fusing, "declined", set())
    fusing.log_once.cache_clear()


class Network:
    """One velocity mixture for every class and time, and twice its means for none."""

    class config:
        num_classes = 1

    def __init__(self, velocity):
        self.velocity = velocity

    def __call__(self, x, sigma, labels):
        factor = (1 + labels.to(x.dtype)).reshape(-1, *[1] * x.ndim)
        parts = [torch.cat([each] * (len(x) // len(each))) for each in vars(self.velocity).values()]
        return GaussianMixture(factor * parts[0], *parts[1:])


def guided_sample(velocity, x, weight, watched=False):
    """A sample, and the means on the way if they are watched."""
    denoiser, means = (
        class_denoiser(Network(velocity), torch.zeros(len(x), dtype=torch.int64), Guidance(weight)),
        [],
    )
    watch = (lambda step, x, mean: means.append(mean.double())) if watched else None
    return sample_gm_ode(
        denoiser, x, flow_sigmas(4), order=2, substeps=2, callback=watch
    ).double(), means


@NO_COMPILER
def test_guided_steps_are_those_of_the_definition(monkeypatch):
    velocity, x = random_mixture(channels=2, dtype=F64), normal(2, 2, 2, 3, dtype=F64)
    with monkeypatch.context() as patch:
        patch.delenv("GMFLOW_METHOD")
        expected = {
            weight: guided_sample(velocity, x, weight, watched=True) for weight in (0.2, 0.4)
        }
    velocity, x = cast(velocity, torch.float32), x.float()
    for weight in (0.4, 0.4, 0.2):  # with another weight the same programs serve
        assert is_near(guided_sample(velocity, x, weight)[0], expected[weight][0], 2e-5)
        # the first step is not corrected
        assert [kind[0].__name__ for kind in fusing._programs] == [
            "_guided_velocities",
            "_few",
            "_few",
        ]
    found, means = guided_sample(velocity, x, 0.2, watched=True)
    assert is_near(found, expected[0.2][0], 2e-5)
    assert all(is_near(*pair, 2e-5) for pair in zip(means, expected[0.2][1], strict=True))
    assert not fusing.declined


@NO_COMPILER
def test_other_sizes_and_numbers_need_no_other_program():
    """Also where a size is 1 that was not, and stands for all."""
    for size, of_std, quadratic in ((4, 4, 0.5), (4, 4, 0.25), (7, 7, 2.0), (6, 1, 0.5)):
        mixture, linear = random_mixture(space=(size,), dtype=F64), normal(2, 3, size, dtype=F64)
        mixture = GaussianMixture(
            mixture.means, mixture.log_weights, normal(2, 1, 1, of_std, dtype=F64) - 1
        )
        single = cast(mixture, torch.float32)
        for _ in range(2):
            found = single.tilted_means()(linear.float(), quadratic)
        components = mixture.tilt(linear, quadratic)
        assert is_near(found.double(), (components.weights * components.means).sum(1), 1e-5)
    assert [kind[0].__name__ for kind in fusing._programs] == ["mean", "mixture"]
    assert not fusing.declined


@NO_COMPILER
def test_tensors_that_were_one_may_be_two():
    mixture, x, other = random_mixture(), normal(2, 3, 2, 3), normal(2, 3, 2, 3, seed=5)
    tilts = mixture.tilt(x, 0.5).tilts
    for _ in range(2):
        tilts.mean(tilts.origin, 0.5)
    assert is_near(
        tilts.mean(other, 0.5),
        mixture.tilt(other + 0.5 * tilts.origin, 0.5).moment_match().mean,
        1e-5,
    )


@NO_COMPILER
def test_draws_by_transport_are_those_of_the_definition(monkeypatch):
    mixture, z = (
        random_mixture(1, 200, 4, 2, (), spread=2.0, dtype=F64),
        1.5 * normal(200, 2, dtype=F64),
    )
    with monkeypatch.context() as patch:
        patch.delenv("GMFLOW_METHOD")
        axes = mixture.principal_axes()
        expected, single = mixture.from_normal(z, axes), cast(mixture, torch.float32)
    # of so many points that some are sorted out; the second axis is compiled
    assert is_near(single.from_normal(z.float(), axes.float()).double(), expected, 1e-4)
    for _ in range(2):
        double = mixture.from_normal(z, axes)
    assert is_near(double, expected, 1e-9)
    for _ in range(2):
        found = single.principal_axes()
    assert is_near(
        (found.double().mT @ axes).abs(), torch.eye(2, dtype=F64).expand_as(axes), 1e-5
    )  # but for signs
    assert {kind[0].__name__ for kind in fusing._programs} == {
        "_start",
        "_improve",
        "_given_point",
        "_principal_axes",
    }
    assert not fusing.declined


def test_the_polynomial_for_exp2():
    x = torch.linspace(-126, 127, 20001)
    exact = x.double().exp2()
    assert ((transport.exp2_by_polynomial(x).double() / exact - 1).abs() < 1.5e-7).all()
    assert transport.exp2_by_polynomial(torch.zeros(1)) == 1


def test_the_polynomial_for_erfc():
    x = torch.linspace(-9, 9, 20001, dtype=F64)
    found = transport.erfc_by_polynomial(x.float(), (-x * x).exp().float()).double()
    normal_numbers = x < 8.9
    assert ((found / torch.erfc(x) - 1).abs()[normal_numbers] < 6e-7).all()
    exact = transport.erfc_by_polynomial(x, (-x * x).exp())
    assert ((exact / torch.erfc(x) - 1).abs() < 3e-8).all()


def test_what_gradients_follow_is_not_compiled(monkeypatch):
    monkeypatch.setattr(fusing, "compiled", lambda function: pytest.fail("compiled"))
    mixture, linear = random_mixture(), normal(2, 3, 2, 3).requires_grad_()
    for _ in range(3):
        mixture.tilted_means()(linear, 0.5).sum().backward()
    assert linear.grad.isfinite().all()


def test_what_does_not_compile_runs_as_it_stands(monkeypatch, caplog):
    def no_compiler(function, **options):
        def run(*arguments):
            raise RuntimeError("no C++ compiler was found")

        return run

    monkeypatch.setattr(torch, "compile", no_compiler)
    mixture, x = random_mixture(), normal(2, 3, 2, 3)
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            noise = torch.Generator().manual_seed(seed)
            assert (
                sample_gm_sde(lambda x, sigma: mixture, x, flow_sigmas(3), noise=noise)
                .isfinite()
                .all()
            )
            assert guided_sample(mixture, x, 0.3)[0].isfinite().all()
    told = [record.message for record in caplog.records]
    assert len(told) == len(set(told))
    assert (
        "GMFlow: _guided_velocities is not compiled (RuntimeError: no C++ compiler was found); it runs as it stands"
        in told
    )
