"""Spectral sampling and loss: the transform's laws, statistics of draws, golden figures."""

import pytest
import torch

from gmflow_core import GaussianMixture, IsotropicGaussian, spectral_nll, velocity_to_x0
from gmflow_core.gaussians.spectral import hartley, sample_with_spectrum
from gmflow_core.models.spectrum import SpectrumMLP
from tests.helpers import F64, golden, golden_mixture, is_near, normal, random_mixture

SIZES = [(6,), (4, 4), (6, 5), (5, 7), (1, 1), (1, 6), (2, 3, 4)]


@pytest.mark.parametrize("space", SIZES)
def test_the_hartley_transform_is_orthogonal_and_its_own_inverse(space):
    x, y = normal(2, 3, *space, dtype=F64), normal(2, 3, *space, seed=2, dtype=F64)
    assert is_near(hartley(hartley(x)), x, 1e-12)
    assert is_near((hartley(x) * hartley(y)).sum(), (x * y).sum(), 1e-12)


def test_the_hartley_transform_is_the_sum_over_cosines_minus_sines():
    x = normal(1, 1, 5, 4, dtype=F64)
    rows, columns = torch.arange(5, dtype=F64), torch.arange(4, dtype=F64)
    angle = (
        2
        * torch.pi
        * (
            torch.outer(rows, rows)[:, None, :, None] / 5
            + torch.outer(columns, columns)[:, None] / 4
        )
    )
    expected = ((angle.cos() - angle.sin()) * x[0, 0]).sum((2, 3)) / 20**0.5
    assert is_near(hartley(x)[0, 0], expected, 1e-12)


@pytest.mark.parametrize("width", [7, 8])
def test_draws_have_the_spectrum_asked_for(width):
    """With one unit Gaussian the draws are the field itself; its periodogram is the spectrum."""
    count, shape = 4000, (1, 6, width)
    log_power = (
        normal(*shape, dtype=F64).flatten(1).log_softmax(1).unflatten(1, shape[1:])
        + torch.tensor(6 * width).log()
    )
    mixture = GaussianMixture(
        torch.zeros(count, 1, *shape),
        torch.zeros(count, 1, 1, 6, width),
        torch.zeros(count, 1, 1, 1, 1),
    )
    draws = sample_with_spectrum(mixture, log_power.float(), normal(count, *shape))
    power = hartley(draws.double()).square().mean(0)
    assert torch.allclose(
        power, log_power.exp(), rtol=0.12
    )  # 5 standard deviations of a mean of `count` chi-squares
    assert abs(draws.var().item() - 1) < 0.02


@pytest.mark.parametrize("space", [(5, 4), (4, 5), (3, 3)])
def test_whatever_the_even_spectrum_each_pixel_follows_its_own_mixture(space):
    """Compare the shares of draws below each pixel's first-channel mean with the exact ones."""
    count, mixture = 4000, random_mixture(batch=1, channels=2, space=space)
    many = GaussianMixture(
        *(
            t.expand(count, *t.shape[1:])
            for t in (mixture.means, mixture.log_weights, mixture.log_std)
        )
    )
    power = (3 * normal(1, 2, *space)).exp()
    power = power + power.flip(2, 3).roll((1, 1), (2, 3))  # as much at -k as at k
    power = (power / power.mean((2, 3), keepdim=True)).log()
    axes = mixture.principal_axes()
    draws = sample_with_spectrum(
        many, power, normal(count, 2, *space), axes.expand(count, -1, -1, -1, -1)
    )
    threshold = mixture.mean()[:, :1]
    below = (draws[:, :1] < threshold).double().mean(0)[0]
    offset = (threshold.unsqueeze(1) - mixture.means[:, :, :1]) / mixture.log_std.exp()
    exact = (mixture.weights * torch.special.ndtr(offset)).sum(1)[0, 0].double()
    assert (below - exact).abs().max() < 5 * 0.5 / count**0.5


def test_golden_spectral_sampling():
    figures, whole = golden("ops_mixture"), golden_mixture("ops_mixture", "gm")
    width = figures["power_spectrum"].shape[-1]
    mixture = GaussianMixture(
        whole.means[..., :width], whole.log_weights[..., :width], whole.log_std
    )
    noise, log_power = figures["gm_sample.draw"][:, 0], figures["power_spectrum"]
    assert is_near(hartley(noise * (0.5 * log_power).exp()), figures["gm_sample.gaussian"][:, 0])
    samples = sample_with_spectrum(
        mixture, log_power, noise, figures["gm_sample.eigvecs"][:, 0, :, None].transpose(1, 2)
    )
    assert is_near(samples, figures["gm_sample.out"][:, 0], 2e-5)


def test_golden_spectral_loss_and_gradients():
    figures, velocity = golden("losses"), golden_mixture("losses", "gm_u")
    network = SpectrumMLP((4, 6, 4), (8, 4))
    prefix = "spectrum."
    network.load_state_dict(
        {k.removeprefix(prefix): v for k, v in figures.items() if k.startswith(prefix)}
    )
    sigma = figures["t_high"] / 1000
    log_power = network(velocity_to_x0(velocity.moment_match(), figures["spectral.x_t"], sigma))
    assert is_near(log_power, figures["spectral.log_var"], 1e-5)
    white = velocity.to_normal(figures["noise_0"] - figures["x_0"], figures["spectral.eigvecs"])
    recorded = hartley(figures["spectral.z"])
    inner = recorded.abs() < 4  # further out the reference's transport loses digits
    assert inner.double().mean() > 0.97
    assert torch.allclose(white[inner], recorded[inner], atol=1e-3)
    # a standard normal "mixture", whose whitening only reorders the channels, takes over from there
    unit = GaussianMixture(
        torch.zeros(3, 1, 4, 6, 4), torch.zeros(3, 1, 1, 6, 4), torch.zeros(1, 1, 1, 1, 1)
    )
    order = unit.principal_axes()[0, 0, 0].argmax(1)
    loss = spectral_nll(unit, recorded[:, order], log_power).mean()
    assert is_near(loss[None], figures["spectral.lossA"], 1e-5)
    (loss / 4).backward()  # its newer form divides by the channels
    for name, parameter in network.named_parameters():
        assert is_near(parameter.grad, figures[f"spectral.gradB.{name}"], 1e-5)


def test_the_loss_is_least_at_the_true_spectrum():
    """A spectrum of the data beats the white one by its relative entropy, and beats others."""
    count, space = 2000, (4, 5)
    power = (
        normal(1, 1, *space).flatten(2).log_softmax(2).unflatten(2, space)
        + torch.tensor(20.0).log()
    )
    mixture = GaussianMixture(
        torch.zeros(count, 1, 1, *space),
        torch.zeros(count, 1, 1, *space),
        torch.zeros(1, 1, 1, 1, 1),
    )
    data = hartley(normal(count, 1, *space) * (0.5 * power).exp())
    best = spectral_nll(mixture, data, power).mean().item()
    assert best == pytest.approx(
        0.5 * power.mean().item(), abs=0.02
    )  # E[power] of every frequency is exp(log power)
    assert spectral_nll(mixture, data, torch.zeros_like(power)).abs().max() == 0
    assert spectral_nll(mixture, data, 0.7 * power).mean() > best
    assert spectral_nll(mixture, data, 1.3 * power).mean() > best


def test_gaussians_and_mixtures_of_velocities_become_x0_alike():
    velocity, x, sigma = (
        random_mixture(dtype=F64),
        normal(2, 3, 2, 3, dtype=F64),
        torch.tensor([0.3, 0.9], dtype=F64),
    )
    gaussian = velocity_to_x0(velocity.moment_match(), x, sigma)
    assert isinstance(gaussian, IsotropicGaussian)
    expected = velocity_to_x0(velocity, x, sigma).moment_match()
    assert is_near(gaussian.mean, expected.mean, 1e-12)
    assert is_near(gaussian.var, expected.var, 1e-12)
