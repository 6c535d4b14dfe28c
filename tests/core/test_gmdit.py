"""GM-DiT and its spectrum network: reference figures, sizes, labels, patches, initialisation."""

import dataclasses

import pytest
import torch

from gmflow_core import IsotropicGaussian
from gmflow_core.models.ditdh import DiTDH, DiTDHConfig
from gmflow_core.models.gmdit import GMDiT, GMDiTConfig
from gmflow_core.models.position_features import grid_features
from gmflow_core.models.spectrum import SpectrumMLP
from tests.helpers import golden, is_near, normal

SMALL = {
    "num_components": 3,
    "latent_size": 8,
    "num_classes": 10,
    "num_layers": 2,
    "num_heads": 4,
    "head_dim": 8,
}
SMALL |= {"log_std_dim": 16, "spectrum_layers": (8, 4)}


def small_network(**changes):
    torch.manual_seed(0)
    network = GMDiT(GMDiTConfig(**{**SMALL, **changes}))
    for parameter in network.parameters():  # modulations start at 0
        torch.nn.init.normal_(parameter, std=0.2)
    return network.requires_grad_(False)


def reference_network():
    figures = golden("gmdit_tiny")
    network = GMDiT(GMDiTConfig(**SMALL))
    weights = {
        k.removeprefix("transformer."): v
        for k, v in figures.items()
        if k.startswith("transformer.")
    }
    network.load_state_dict(
        {**weights, **{k: v for k, v in figures.items() if k.startswith("spectrum_net.")}}
    )
    return network.requires_grad_(False)


def test_golden_network():
    figures, network = golden("gmdit_tiny"), reference_network()
    sigma = figures["fwd.t"] / 1000
    assert is_near(network.condition(sigma, figures["fwd.labels"]), figures["fwd.emb"])
    assert is_near(grid_features(4, 4, 32, extent=4), figures["pos_embed_buffer"][0])
    mixture = network(figures["fwd.x"], sigma, figures["fwd.labels"])
    assert is_near(mixture.means, figures["fwd.means"])
    assert is_near(mixture.log_weights, figures["fwd.logweights"])
    assert is_near(mixture.log_std, figures["fwd.logstds"])
    assert is_near(network.spectrum_net(mixture.moment_match()), figures["fwd.spectrum"])


def test_the_published_size_is_the_default():
    with torch.device("meta"):
        network, spectrum = GMDiT(), SpectrumMLP()
    assert sum(p.numel() for p in network.parameters()) == 676_164_001
    assert sum(p.numel() for p in spectrum.parameters()) == 37_576


def test_labels_and_time_matter_and_samples_do_not_mix():
    network, x = small_network(), normal(3, 4, 8, 8)
    sigma, labels = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([3, 10, 0])
    whole = network(x, sigma, labels)
    for i in range(3):
        alone = network(x[i : i + 1], sigma[i : i + 1], labels[i : i + 1])
        assert is_near(alone.means, whole.means[i : i + 1], 1e-5)
        assert is_near(alone.log_std, whole.log_std[i : i + 1], 1e-5)
    other = network(x, sigma, torch.tensor([3, 4, 0]))
    assert torch.equal(other.means[0], whole.means[0])
    assert (other.means[1] - whole.means[1]).abs().max() > 1e-2
    assert (network(x, sigma * 0.9, labels).means - whole.means).abs().amax(
        (1, 2, 3, 4)
    ).min() > 1e-3
    assert torch.equal(network(x, torch.tensor(0.5), labels).means[1], whole.means[1])


def test_patches_are_put_back_where_they_came_from():
    """Without blocks and positions, a pixel depends on its own patch alone."""
    network = small_network(num_layers=1)
    torch.nn.init.zeros_(network.transformer_blocks[0].norm1["linear"].weight)
    torch.nn.init.zeros_(network.transformer_blocks[0].norm1["linear"].bias)
    x, label = normal(1, 4, 8, 6), torch.tensor([1])
    moved = x.clone()
    moved[..., 2:4, 4:6] += 1
    difference = (
        network(moved, torch.tensor(0.5), label).means - network(x, torch.tensor(0.5), label).means
    )
    changed = difference.abs().amax((0, 1, 2)) > 1e-6
    expected = torch.zeros(8, 6, dtype=torch.bool)
    expected[2:4, 4:6] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("size", [(8, 8), (4, 8), (2, 6)])
def test_any_size_up_to_the_models_own(size):
    network = small_network()
    x, sigma, labels = normal(2, 4, *size), torch.tensor([0.3, 0.8]), torch.tensor([0, 10])
    mixture = network(x, sigma, labels)
    assert mixture.means.shape == (2, 3, 4, *size)
    assert torch.allclose(mixture.weights.sum(1), torch.ones(2, 1, *size))
    assert network.spectrum_net(mixture.moment_match()).shape == (2, 4, *size)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 4, 7, 8), (1, 4, 8, 10), (4, 8, 8)])
def test_sizes_that_do_not_fit_are_quoted(shape):
    with pytest.raises(ValueError, match=r"GMDiT works on|do not fit this model"):
        small_network()(torch.zeros(shape), torch.tensor(0.5), torch.tensor([0]))


@pytest.mark.parametrize(
    "changes",
    [{"num_classes": 0}, {"head_dim": 3, "num_heads": 1}, {"latent_size": 9}, {"log_std_dim": 0}],
)
def test_configurations_that_cannot_be_are_quoted(changes):
    with pytest.raises(ValueError, match=str(next(iter(changes.values())))):
        GMDiTConfig(**{**SMALL, **changes})


@pytest.mark.parametrize("kind", [GMDiT, DiTDH])
def test_blocks_get_contiguous_tokens(kind):
    """Others are NaN after torch.compile in bfloat16 on a CPU (seen with 64 tokens of 128)."""
    if kind is GMDiT:
        network = small_network()
        blocks = network.transformer_blocks
    else:
        sizes = {"trunk_width": 64, "trunk_layers": 1, "head_width": 64, "head_layers": 1}
        network = DiTDH(DiTDHConfig(channels=4, latent_size=8, **sizes)).requires_grad_(False)
        blocks = network.blocks
    seen = []
    for block in blocks:
        block.register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous()))
    network(normal(2, 4, 8, 8), torch.tensor(0.5), torch.zeros(2, dtype=torch.long))
    assert seen == [True] * len(blocks)


def test_gradient_checkpointing_changes_nothing_but_memory():
    x, sigma, labels = normal(2, 4, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([0, 10])
    gradients = []
    for remember in (True, False):
        network = small_network().requires_grad_(True)
        network.gradient_checkpointing = not remember
        network(x, sigma, labels).log_prob(x).mean().backward()
        gradients.append(
            {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())


def test_the_transformer_learns_nothing_from_the_log_std():
    network = small_network().requires_grad_(True)
    network(normal(2, 4, 8, 8), torch.tensor(0.5), torch.tensor([0, 1])).log_std.sum().backward()
    touched = {name for name, p in network.named_parameters() if p.grad is not None}
    assert touched == {name for name, _ in network.named_parameters() if name.startswith("gm_out.")}


def test_bfloat16_weights_give_float32_mixtures():
    network, x = small_network(), normal(2, 4, 8, 8)
    sigma, labels = torch.tensor([0.3, 0.8]), torch.tensor([0, 10])
    exact = network(x, sigma, labels)
    half = network.to(torch.bfloat16)(x, sigma, labels)
    assert half.means.dtype == half.log_weights.dtype == torch.float32
    assert is_near(half.means, exact.means, 0.05)
    assert torch.allclose(half.weights.sum(1), torch.ones(2, 1, 8, 8))


def test_a_fixed_log_std_needs_no_head():
    network = small_network(constant_log_std=-0.5, num_components=1)
    mixture = network(normal(2, 4, 8, 8), torch.tensor(0.5), torch.tensor([0, 1]))
    assert torch.equal(mixture.log_std, torch.full((2, 1, 1, 1, 1), -0.5))
    assert not any(name.startswith("gm_out.") for name in network.state_dict())


def test_the_config_goes_through_json():
    config = GMDiTConfig(**SMALL)
    assert GMDiTConfig(**{**dataclasses.asdict(config), "spectrum_layers": [8, 4]}) == config


def test_a_new_spectrum_is_white_and_every_spectrum_has_mean_power_1():
    x0 = IsotropicGaussian(normal(3, 4, 6, 5), torch.rand(3, 1, 1, 1))
    network = SpectrumMLP((4, 8, 8), (8, 4))
    assert torch.equal(network(x0), torch.zeros(3, 4, 6, 5))
    torch.nn.init.normal_(network.mlp[-1].weight)
    power = network(x0).exp().mean((2, 3))
    assert is_near(power, torch.ones(3, 4), 1e-5)


@pytest.mark.parametrize(("height", "width"), [(5, 4), (1, 1), (2, 7)])
def test_smaller_latents_take_the_low_frequencies(height, width):
    network = SpectrumMLP((1, 8, 8), ())
    torch.nn.init.zeros_(network.mlp[0].weight)
    frequency = torch.fft.fftfreq(8, 1 / 8)
    network.mlp[0].bias.data = (10 * frequency[:, None] + frequency).flatten()
    log_power = network(IsotropicGaussian(normal(1, 1, height, width), torch.ones(1, 1, 1, 1)))[
        0, 0
    ]
    rows, columns = torch.fft.fftfreq(height, 1 / height), torch.fft.fftfreq(width, 1 / width)
    expected = 10 * rows[:, None] + columns
    assert torch.allclose(log_power - log_power[0, 0], expected - expected[0, 0], atol=1e-4)


def test_latents_that_the_spectrum_cannot_serve_are_quoted():
    network = SpectrumMLP((4, 8, 8))
    for shape in ((1, 3, 8, 8), (1, 4, 9, 8), (2, 4)):
        with pytest.raises(ValueError, match="serves latents of 4 channels up to 8 x 8"):
            network(
                IsotropicGaussian(torch.zeros(shape), torch.ones(shape[0], *[1] * (len(shape) - 1)))
            )
