"""DiTDH: reference figures, published sizes, its two parts, labels, and a mixture at its output."""

import dataclasses

import pytest
import torch

from gmflow_core.models.ditdh import DiTDH, DiTDHConfig, grid_rotation, rotate_pairs
from tests.helpers import golden, is_near, normal

SMALL = {
    "channels": 6,
    "latent_size": 4,
    "num_classes": 10,
    "trunk_layers": 2,
    "trunk_width": 16,
    "trunk_heads": 2,
}
SMALL |= {"head_layers": 1, "head_width": 24, "head_heads": 3, "log_std_dim": 16}
S = {"trunk_layers": 12, "trunk_width": 384, "trunk_heads": 6}
MODES = {"num_classes": 8192, "null_class": False}


def small_network(**changes):
    torch.manual_seed(0)
    network = DiTDH(DiTDHConfig(**{**SMALL, **changes}))
    for parameter in network.parameters():  # modulations start at 0
        torch.nn.init.normal_(parameter, std=0.2)
    return network.requires_grad_(False)


def published_tensors():
    return {
        k.removeprefix("net."): v for k, v in golden("ddt_tiny").items() if k.startswith("net.")
    }


def test_golden_network():
    """Compare with figures of RAE's public DiTwDDTHead, whose names are the same."""
    figures, network = golden("ddt_tiny"), DiTDH.from_published(published_tensors(), head_layers=1)
    assert dataclasses.replace(network.config, num_classes=10, log_std_dim=16) == DiTDHConfig(
        **SMALL
    )
    mixture = network(figures["x"], figures["sigma"], figures["labels"])
    assert is_near(mixture.mean(), figures["velocity"])
    assert torch.equal(mixture.log_weights, torch.zeros(2, 1, 1, 4, 4))
    assert torch.equal(mixture.log_std, torch.zeros(2, 1, 1, 1, 1))


def test_published_tensors_that_do_not_fit_are_named():
    tensors = published_tensors()
    with pytest.raises(ValueError, match=r"not those of a DiTwDDTHead.*s_embedder"):
        DiTDH.from_published({"weight": torch.zeros(2)})
    tensors["blocks.0.attn.q_norm.weight"] = torch.ones(8)
    with pytest.raises(
        ValueError, match=r"1 tensors do not fit.*q_norm.*expected none, found \(8,\)"
    ):
        DiTDH.from_published(tensors, head_layers=1)
    del tensors["blocks.0.attn.q_norm.weight"], tensors["final_layer.linear.bias"]
    with pytest.raises(ValueError, match=r"final_layer.linear.bias.*expected \(6,\), found none"):
        DiTDH.from_published(tensors, head_layers=1)


@pytest.mark.parametrize(
    ("changes", "count"),
    [({}, 838_380_628), (S, 196_357_204), (MODES, 846_664_660), ({"num_classes": 0}, 837_227_476)],
)
def test_published_sizes(changes, count):
    """XL 838.4 M, S 196.4 M. Published files also store positions, which are computed here."""
    with torch.device("meta"):
        network = DiTDH(DiTDHConfig(**changes))
    assert sum(p.numel() for p in network.parameters()) == count


def test_it_starts_as_the_mean_0_and_learns_from_there():
    torch.manual_seed(0)
    network = DiTDH(DiTDHConfig(**SMALL))
    x, target = normal(4, 6, 4, 4), normal(4, 6, 4, 4, seed=2)
    sigma, labels = torch.rand(4), torch.arange(4)
    optimizer, losses = torch.optim.Adam(network.parameters(), 3e-3), []
    for _ in range(60):
        losses.append((network(x, sigma, labels).mean() - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] == target.square().mean()
    assert losses[-1] < 0.2 * losses[0]
    moved = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not moved


def test_components_do_not_start_alike():
    torch.manual_seed(0)
    network = DiTDH(
        DiTDHConfig(**SMALL, num_components=3, constant_log_std=None, spectrum_layers=(8, 4))
    )
    mixture = network(normal(2, 6, 4, 4), torch.tensor(0.5), torch.tensor([0, 10]))
    assert mixture.means.shape == (2, 3, 6, 4, 4)
    assert mixture.log_weights.shape == (2, 3, 1, 4, 4)
    assert mixture.log_std.shape == (2, 1, 1, 1, 1)
    assert torch.allclose(mixture.weights.sum(1), torch.ones(2, 1, 4, 4))
    assert (mixture.means[:, 0] - mixture.means[:, 1]).abs().mean() > 0.1
    assert network.spectrum_net(mixture.moment_match()).shape == (2, 6, 4, 4)
    mixture.log_prob(normal(2, 6, 4, 4, seed=2)).mean().backward()
    assert all(
        p.grad is not None
        for name, p in network.named_parameters()
        if not name.startswith("spectrum_net.")
    )
    network.zero_grad(set_to_none=True)
    network(normal(2, 6, 4, 4), torch.tensor(0.5), torch.tensor([0, 10])).log_std.sum().backward()
    assert {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None} == {
        "gm_out"
    }


def test_labels_and_time_matter_and_samples_do_not_mix():
    network, x = small_network(), normal(3, 6, 4, 4)
    sigma, labels = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([3, 10, 0])
    whole = network(x, sigma, labels).means
    for i in range(3):
        assert is_near(
            network(x[i : i + 1], sigma[i : i + 1], labels[i : i + 1]).means, whole[i : i + 1], 1e-5
        )
    other = network(x, sigma, torch.tensor([3, 4, 0])).means
    assert torch.equal(other[0], whole[0])
    assert (other[1] - whole[1]).abs().max() > 1e-3
    assert (network(x, sigma * 0.9, labels).means - whole).abs().amax((1, 2, 3, 4)).min() > 1e-3


def test_without_classes_labels_are_not_read():
    network, x = small_network(num_classes=0), normal(2, 6, 4, 4)
    assert not any(name.startswith("y_embedder") for name in network.state_dict())
    assert torch.equal(
        network(x, torch.tensor(0.5)).means,
        network(x, torch.tensor(0.5), torch.tensor([0, 7])).means,
    )
    with pytest.raises(ValueError, match="give labels from 0 to 9"):
        small_network()(x, torch.tensor(0.5))
    table = small_network(null_class=False).y_embedder["embedding_table"]
    assert len(table.weight) == 10


def test_positions_are_relative_in_rotations_and_stretch_with_the_grid():
    cosine, sine = grid_rotation(3, 5, 8, 5)
    q, k = normal(8), normal(8, seed=2)
    turned_q, turned_k = (
        rotate_pairs(t.expand(15, 8), cosine, sine).unflatten(0, (3, 5)) for t in (q, k)
    )
    # each query with the key one down and two to the right
    products = torch.einsum("hwc,hwc->hw", turned_q[:2, :3], turned_k[1:, 2:])
    assert torch.allclose(products, products[0, 0].expand(2, 3), atol=1e-5)
    assert not torch.allclose(products[0, 0], (turned_q[0, 0] * turned_k[1, 1]).sum(), atol=1e-3)
    half, whole = grid_rotation(2, 2, 8, 4), grid_rotation(4, 4, 8, 4)
    assert torch.allclose(half[0], whole[0].unflatten(0, (4, 4))[::2, ::2].flatten(0, 1))
    network = small_network()
    for size in ((4, 4), (2, 4), (3, 1)):
        assert network(normal(1, 6, *size), torch.tensor(0.5), torch.tensor([1])).means.shape == (
            1,
            1,
            6,
            *size,
        )


def test_patches_are_put_back_where_they_came_from():
    """Without trunk and attention, a pixel depends on its own patch alone."""
    network = small_network(patch_size=2, num_components=2)
    for part in (network.s_projector, *(block.adaLN_modulation[-1] for block in network.blocks)):
        torch.nn.init.zeros_(part.weight)
        torch.nn.init.zeros_(part.bias)
    x, label = normal(1, 6, 4, 4), torch.tensor([1])
    moved = x.clone()
    moved[..., 2:4, 0:2] += 1
    difference = (
        network(moved, torch.tensor(0.5), label).means - network(x, torch.tensor(0.5), label).means
    )
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[2:4, 0:2] = True
    assert torch.equal(difference.abs().amax((0, 1, 2)) > 1e-6, expected)


def test_gradient_checkpointing_changes_nothing_but_memory():
    x, sigma, labels, gradients = (
        normal(2, 6, 4, 4),
        torch.tensor([0.3, 0.8]),
        torch.tensor([0, 10]),
        [],
    )
    for remember in (True, False):
        network = small_network().requires_grad_(True)
        network.gradient_checkpointing = not remember
        network(x, sigma, labels).log_prob(x).mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    assert all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())


def test_low_precision():
    """bfloat16 weights or autocast give float32 mixtures near the exact ones."""
    network, x = small_network(), normal(2, 6, 4, 4)
    arguments = x, torch.tensor([0.3, 0.8]), torch.tensor([0, 10])
    exact, frequencies = network(*arguments).means, network.t_embedder.W.clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert is_near(network(*arguments).means, exact, 0.05)
    half = network.to(torch.bfloat16)
    assert torch.equal(half.t_embedder.W.float(), frequencies)
    assert half(*arguments).means.dtype == torch.float32
    assert is_near(half(*arguments).means, exact, 0.05)


def test_it_compiles_to_one_graph():
    network = small_network()
    x, sigma, labels = normal(2, 6, 4, 4), torch.tensor([0.3, 0.8]), torch.tensor([0, 10])
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert is_near(compiled(x, sigma, labels).means, network(x, sigma, labels).means, 1e-6)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (1, 6, 8, 4), (6, 4, 4)])
def test_sizes_that_do_not_fit_are_quoted(shape):
    with pytest.raises(
        ValueError, match=r"DiTDH works on latents \(B, 6, h, w\)|4 do not fit this model.*up to 4"
    ):
        small_network()(torch.zeros(shape), torch.tensor(0.5), torch.tensor([0]))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": -1},
        {"trunk_heads": 3},
        {"head_width": 30},
        {"patch_size": 3},
        {"head_layers": 0},
    ],
)
def test_configurations_that_cannot_be_are_quoted(changes):
    with pytest.raises(ValueError, match=str(next(iter(changes.values())))):
        DiTDHConfig(**{**SMALL, **changes})


def test_the_config_goes_through_json():
    config = DiTDHConfig(**SMALL, spectrum_layers=(8, 4))
    assert DiTDHConfig(**{**dataclasses.asdict(config), "spectrum_layers": [8, 4]}) == config
