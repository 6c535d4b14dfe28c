"""MLP for 2-D points: shapes, independence of its pixels, precision, size and configuration."""

import pytest
import torch

from gmflow_core.models.mlp import GMFlowMLP, GMFlowMLPConfig
from gmflow_core.models.precision import chosen_precision, set_precision
from tests.helpers import SPACES, is_near, normal

SMALL = {"num_components": 5, "embed_dim": 16, "hidden_dim": 24, "num_layers": 2}


def small_network(**changes):
    torch.manual_seed(0)
    network = GMFlowMLP(GMFlowMLPConfig(**{**SMALL, **changes}))
    torch.nn.init.normal_(network.out_logweights.weight, std=0.3)  # they start at 0
    return network.requires_grad_(False)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("constant_log_std", [None, -0.5])
def test_one_output_for_every_point_whatever_the_shape(space, constant_log_std):
    network, x = small_network(constant_log_std=constant_log_std), normal(3, 2, *space)
    sigma = torch.tensor([1.0, 0.4, 0.0])
    out = network(x, sigma)
    assert out.means.shape == (3, 5, 2, *space)
    assert out.log_weights.shape == (3, 5, 1, *space)
    assert torch.allclose(out.weights.sum(1), torch.ones(3, 1, *space))
    if constant_log_std is None:
        assert out.log_std.shape == (3, 1, 1, *space)
    else:
        assert (out.log_std == constant_log_std).all()
    points = x.movedim(1, -1).reshape(-1, 2)
    sigmas = sigma.repeat_interleave(points.shape[0] // 3)
    alone = network(points, sigmas)
    assert is_near(out.means.movedim((1, 2), (-2, -1)).reshape(-1, 5, 2), alone.means, 1e-5)
    assert is_near(
        out.log_weights.movedim((1, 2), (-2, -1)).reshape(-1, 5, 1), alone.log_weights, 1e-5
    )


def test_pixels_do_not_see_each_other():
    network, x = small_network(), normal(1, 2, 3, 3)
    changed = x.clone()
    changed[..., 1, 2] += 1
    difference = (network(x, 0.5).means - network(changed, 0.5).means).abs().amax((0, 1, 2))
    assert difference[1, 2] > 1e-3
    assert (difference.flatten() > 1e-6).sum() == 1


def test_sigma_may_be_a_number_or_one_per_sample():
    network, x = small_network(), normal(3, 2)
    assert torch.equal(network(x, 0.3).means, network(x, torch.full((3,), 0.3)).means)
    assert not torch.equal(network(x, 0.3).means, network(x, 0.31).means)


def test_half_precision_weights_give_nearly_the_same_float32_mixture():
    network, x = small_network(), normal(200, 2)
    full, half = network(x, 0.5), small_network().to(torch.bfloat16)(x, 0.5)
    for name in ("means", "log_weights", "log_std"):
        assert getattr(half, name).dtype == torch.float32
        assert is_near(getattr(half, name), getattr(full, name), 0.05)  # bfloat16 keeps 8 bits
    assert torch.allclose(half.weights.sum(1), torch.ones(200, 1))


def test_the_default_network_has_the_published_size():
    assert sum(p.numel() for p in GMFlowMLP().parameters()) == 1_412_289


def test_a_new_network_weighs_all_components_alike():
    out = GMFlowMLP(GMFlowMLPConfig(**SMALL))(normal(4, 2), 0.5)
    assert torch.allclose(out.weights, torch.full((4, 5, 1), 0.2))
    assert (out.log_std == 0).all()


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"num_components": 0}, "num_components is 0"),
        ({"num_layers": -1}, "num_layers is -1"),
        ({"embed_dim": 18}, "embed_dim is 18.*divisible by 4"),
        ({"min_period": 9.0, "max_period": 2.0}, "9.0 < 2.0"),
    ],
)
def test_configs_out_of_range_are_quoted(changes, quoted):
    with pytest.raises(ValueError, match=quoted):
        GMFlowMLPConfig(**changes)


@pytest.mark.parametrize("shape", [(4, 3), (4,), (2, 4, 4, 2)])
def test_inputs_without_two_channels_are_quoted(shape):
    with pytest.raises(ValueError, match=rf"\(B, 2, \.\.\.\), not \({shape[0]},"):
        small_network()(torch.zeros(shape), 0.5)


def test_reduced_precision_is_of_the_network_alone():
    torch.manual_seed(0)
    network = GMFlowMLP(GMFlowMLPConfig(num_components=3, hidden_dim=16, embed_dim=8))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, sigma = torch.randn(5, 2), torch.rand(5)
    exact = network(x, sigma)
    assert torch.equal(set_precision(network, "fp32")(x, sigma).means, exact.means)
    found = set_precision(network, "bf16")(x, sigma)
    for a, b in zip(
        (found.means, found.log_weights), (exact.means, exact.log_weights), strict=True
    ):
        assert a.dtype == torch.float32
        assert 0 < (a - b).abs().max() < 0.05
    assert all(p.dtype == torch.float32 for p in network.parameters())
    assert chosen_precision("auto", torch.device("cpu")) == "fp32"
    assert chosen_precision("bf16", torch.device("cpu")) == "bf16"
