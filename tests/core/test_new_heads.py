"""New heads to train begin as the base model's last layers, in any order of a token's values."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gmflow_core.gaussians.mixture import GaussianMixture
from gmflow_core.models.adapter_heads import HeadLayout, build_head, sigma_features
from gmflow_core.models.new_heads import STD, LastLayers, new_dx_head, new_gm_head

CHANNELS, WIDTH, BATCH, TOKENS, K = 3, 16, 2, 6, 4
LAYOUTS = {
    "norm": HeadLayout(CHANNELS),
    "norm without bias": HeadLayout(CHANNELS, modulation_bias=False),
    "linear": HeadLayout(CHANNELS, linear_only=True),
    "channels last": HeadLayout(CHANNELS, linear_only=True, channels_last=True),
    "negative": HeadLayout(CHANNELS, linear_only=True, channels_last=True, negative=True),
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def last_layers(layout: HeadLayout) -> LastLayers:
    weight, bias = normal(layout.width, WIDTH, seed=0), normal(layout.width, seed=1)
    if layout.linear_only:
        return LastLayers(weight, bias)
    shift = normal(2 * WIDTH, seed=3) if layout.modulation_bias else None
    return LastLayers(weight, bias, normal(2 * WIDTH, WIDTH, seed=2), shift)


def output_of(last: LastLayers, layout: HeadLayout, tokens: Tensor, embedding: Tensor) -> Tensor:
    """Return what the base model's last layers return."""
    if last.modulation is not None:
        about = F.linear(F.silu(embedding), last.modulation, last.modulation_bias)
        scale, shift = about.unsqueeze(1).chunk(2, -1)
        tokens = F.layer_norm(tokens, (WIDTH,), eps=1e-6) * (1 + scale) + shift
    return F.linear(tokens, last.weight, last.bias)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_new_head_predicts_what_the_last_layers_do(name: str) -> None:
    """The mean of a mixture is theirs but for the mean of the spread; a DX policy is theirs."""
    layout = LAYOUTS[name]
    last, tokens = last_layers(layout), normal(BATCH, TOKENS, WIDTH, seed=4)
    embedding = normal(BATCH, WIDTH, seed=5)
    if layout.linear_only:
        embedding = sigma_features(torch.tensor([0.2, 0.9]))
    expected = output_of(last, layout, tokens, embedding)
    dx = new_dx_head(last, layout, 5, {"segment_size": 0.5, "shift": 1.0})
    assert torch.allclose(layout.to_tokens(dx(tokens, embedding).mean()), expected, atol=1e-5)
    head = new_gm_head(last, layout, K, torch.Generator().manual_seed(0))
    mixture = head(tokens, embedding)
    assert isinstance(mixture, GaussianMixture)
    assert torch.allclose(mixture.log_weights.exp(), torch.tensor(1 / K))
    assert torch.allclose(mixture.log_std, torch.tensor(math.log(STD)))
    spread = mixture.means - mixture.means.mean(1, keepdim=True)
    assert 0.02 < spread.std() < 0.08
    moved = mixture.means.mean(1) - layout.from_tokens(expected)  # by the same for all tokens
    assert torch.allclose(moved, moved[:1, :, :1, :1].expand_as(moved), atol=1e-5)
    assert moved.abs().max() < 0.1


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_new_head_is_read_back_from_its_tensors(name: str) -> None:
    layout = LAYOUTS[name]
    head = new_gm_head(last_layers(layout), layout, K, torch.Generator().manual_seed(0))
    tensors, policy = head.state_dict(), {"type": "GMFlow"}
    read = build_head(tensors, policy, layout, WIDTH).state_dict()
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)


def test_tokens_of_the_image_are_found_behind_others() -> None:
    layout = LAYOUTS["channels last"]
    values = normal(BATCH, CHANNELS, 9, 4, seed=6)
    alone = layout.to_image(values[..., 3:, :], (4, 6))
    assert torch.equal(layout.to_image(values, (4, 6), first=3), alone)
    assert torch.equal(layout.from_tokens(layout.to_tokens(values)), values)
