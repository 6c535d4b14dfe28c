"""Spectral sampling and loss: the transform's laws, statistics of draws, golden figures."""

import pytest
import torch

from gmflow_core import GaussianMixture, IsotropicGaussian, spectral_nll, velocity_to_x0
from gmflow_core.gaussians.density import LOG_2PI
from gmflow_core.gaussians.spectral import hartley, sample_with_spectrum, spectral_log_prob
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


# Density of the draws


def unit_spectrum(*shape):
    """Return an even log-spectrum (1, C, *S), of mean power 1 per axis."""
    power = normal(1, *shape, dtype=F64).exp()
    dims = tuple(range(2, power.ndim))
    power = power + power.flip(dims).roll([1] * len(dims), dims)
    return (power / power.mean(dims, keepdim=True)).log()


@pytest.mark.parametrize("space", [(5,), (3, 4), (2, 1, 3)])
def test_the_density_of_one_gaussian_is_that_of_its_dense_covariance(space):
    """std^2 H diag(power) H for each channel, where H is the Hartley matrix."""
    mixture = random_mixture(components=1, channels=2, space=space, dtype=F64)
    log_power, x = unit_spectrum(2, *space), normal(2, 2, *space, dtype=F64)
    axes = mixture.principal_axes()
    found = spectral_log_prob(mixture, x, log_power, axes)
    size = x[0, 0].numel()
    transform = hartley(torch.eye(size, dtype=F64).reshape(size, 1, *space)).reshape(size, size)
    for b in range(2):
        field = ((x - mixture.mean())[b].movedim(0, -1) @ axes[b].reshape(2, 2)).movedim(-1, 0)
        var, expected = mixture.var[b].item(), 0.0
        for axis in range(2):
            covariance = var * transform @ log_power[0, axis].exp().flatten().diag() @ transform
            peer = torch.distributions.MultivariateNormal(torch.zeros(size).double(), covariance)
            expected = expected + peer.log_prob(field[axis].flatten())
        assert is_near(found[b], expected, 1e-9)


def test_the_density_is_that_of_the_draws_as_a_function_of_their_noise():
    """log N(noise) - log |det d x / d noise|, for a mixture whose channels depend on each other."""
    mixture = random_mixture(batch=1, components=3, channels=2, space=(2, 2), dtype=F64)
    log_power, noise = unit_spectrum(2, 2, 2), normal(1, 2, 2, 2, seed=5, dtype=F64)
    axes = mixture.principal_axes()

    def draw(noise):
        return sample_with_spectrum(mixture, log_power, noise.reshape(1, 2, 2, 2), axes).flatten()

    jacobian = torch.autograd.functional.jacobian(draw, noise.flatten())
    normal_density = -0.5 * (noise.square().sum() + 8 * LOG_2PI)
    expected = normal_density - torch.linalg.slogdet(jacobian)[1]
    found = spectral_log_prob(mixture, draw(noise).reshape(1, 2, 2, 2), log_power, axes)
    assert is_near(found, expected[None], 1e-7)


@pytest.mark.parametrize("tilt", [0.0, 0.5])
def test_draws_have_the_mean_log_likelihood_of_minus_the_entropy(tilt):
    """A Gaussian's entropy is D / 2 log 2 pi e + D log std + half the sum of the log-spectrum."""
    count, one = 4000, random_mixture(batch=1, components=1, channels=2, space=(3, 4))
    parts = (one.means, one.log_weights, one.log_std)
    many = GaussianMixture(*(t.expand(count, *t.shape[1:]) for t in parts))
    log_power = unit_spectrum(2, 3, 4).float()
    x = sample_with_spectrum(many, log_power, normal(count, 2, 3, 4))
    entropy = 24 * (one.log_std.item() + 0.5 * (1 + LOG_2PI)) + 0.5 * log_power.sum().item()
    surprise = -spectral_log_prob(many, x, (1 - tilt) * log_power)
    assert surprise.std().item() / count**0.5 < 0.07  # sqrt(D / 2) for the true spectrum, per draw
    if tilt == 0:
        assert abs(surprise.mean().item() - entropy) < 4.5 * 12**0.5 / count**0.5
    else:  # any other spectrum's cross entropy is larger
        assert surprise.mean().item() > entropy + 0.2


def test_with_a_white_spectrum_pixels_are_independent():
    mixture, x = random_mixture(dtype=F64), normal(2, 3, 2, 3, dtype=F64)
    expected = mixture.log_prob(x).sum((1, 2))
    assert is_near(spectral_log_prob(mixture, x, torch.zeros(1, 3, 2, 3)), expected, 1e-12)
