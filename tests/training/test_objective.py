"""Test the losses of image training, and the labels and times that they are computed at."""

from pathlib import Path
from shlex import split

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from gmflow_core import (
    diffuse,
    forward_transition,
    nll,
    spectral_nll,
    transition_nll,
    velocity_to_x0,
)
from tests.training.image_runs import new_trainer, write_colours
from training.common.devices import training_attention


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_colours(tmp_path_factory.mktemp("data"))


def test_labels_are_dropped_and_sigmas_drawn_as_asked(data, tmp_path):
    trainer = new_trainer(data, tmp_path, 10, "--batch-size", "4096")
    labels, sigma, low, high = trainer.draw(
        torch.ones(4096, dtype=torch.long), (3, 4, 4), range(4096)
    )
    assert (labels == 3).double().mean().item() == pytest.approx(0.1, abs=0.02)
    assert set(labels.tolist()) == {1, 3}
    logit = sigma.double().logit()
    assert (logit.mean().item(), logit.std().item()) == (
        pytest.approx(0, abs=0.06),
        pytest.approx(1, abs=0.05),
    )
    assert low.shape == high.shape == (4096, 3, 4, 4)
    assert abs((low * high).mean().item()) < 0.01
    assert abs((low[:, 0, 0, 0] * logit).mean().item()) < 0.06


def test_times_are_limited_before_the_shift(data, tmp_path):
    more = split("--time-sampling uniform --time-max 0.6 --time-shift 3 --batch-size 4096")
    trainer = new_trainer(data, tmp_path, 10, *more)
    labels = torch.ones(4096, dtype=torch.long)
    sigma = trainer.draw(labels, (3, 4, 4), range(4096))[1].double()
    top = 3 * 0.6 / (1 + 2 * 0.6)
    assert sigma.max().item() == pytest.approx(top)
    assert (sigma > top - 1e-6).double().mean().item() == pytest.approx(0.4, abs=0.03)
    times = sigma / (3 - 2 * sigma)
    assert (times < 0.3).double().mean().item() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("ratio", [0.8, None])
def test_the_objective_is_the_weighted_sum_of_the_losses(ratio, data, tmp_path):
    """Compare with the sum written out, with other weights than the presets'."""
    weights = ["--loss-weight", "3", "--spectral-weight", "0.5", "--transition-ratio", str(ratio)]
    trainer = new_trainer(data, tmp_path, 10, *weights)
    torch.nn.init.normal_(trainer.model.spectrum_net.mlp[-1].weight)
    x0, labels = trainer.dataset.__getitems__(range(16))
    sigma = torch.linspace(0.1, 0.9, 16)
    low, high = (
        torch.randn(x0.shape, generator=torch.Generator().manual_seed(i)) for i in range(2)
    )
    with torch.no_grad():
        losses = trainer.prepared(x0, labels, sigma, low, high)
        if ratio is None:
            x = diffuse(x0, sigma, low)
            velocity = trainer.model(x, sigma, labels)
            flow = nll(velocity, low - x0).mean()
        else:
            x_low = diffuse(x0, 0.2 * sigma, low)
            x = forward_transition(x_low, 0.2 * sigma, sigma, high)
            velocity = trainer.model(x, sigma, labels)
            flow = transition_nll(velocity, x_low, x, 0.2 * sigma, sigma).mean()
        log_power = trainer.model.spectrum_net(velocity_to_x0(velocity.moment_match(), x, sigma))
        spectral = spectral_nll(velocity, (x - x0) / sigma[:, None, None, None], log_power).mean()
    assert losses["nll"].item() == pytest.approx(flow.item(), rel=1e-5)
    assert losses["spectral"].item() == pytest.approx(spectral.item(), rel=1e-4)
    assert losses["loss"].item() == pytest.approx(3 * flow.item() + 0.5 * spectral.item(), rel=1e-5)


def test_the_spectral_loss_trains_the_spectrum_network_alone(data, tmp_path):
    trainer = new_trainer(data, tmp_path, 10)
    torch.nn.init.normal_(trainer.model.spectrum_net.mlp[-1].weight)
    x0, labels = trainer.dataset.__getitems__(range(4))
    noise = torch.randn(2, *x0.shape, generator=torch.Generator().manual_seed(0))
    trainer.prepared(x0, labels, torch.full((4,), 0.5), *noise)["spectral"].backward()
    touched = {
        name.split(".")[0]
        for name, p in trainer.model.named_parameters()
        if p.grad is not None and p.grad.any()
    }
    assert touched == {"spectrum_net"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [64, 256])
def test_only_short_bfloat16_attention_on_a_cpu_leaves_the_fused_kernel(precision, tokens):
    cpu = torch.device("cpu")
    q, k, v = torch.randn(3, 2, 2, tokens, 8, generator=torch.Generator().manual_seed(0))
    exact = scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
    with (
        profile(activities=[ProfilerActivity.CPU]) as profiler,
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        training_attention(cpu, precision, tokens),
    ):
        mixed = scaled_dot_product_attention(q, k, v)
    fused = any("flash" in event.key for event in profiler.key_averages())
    assert fused == (precision == "fp32" or tokens == 256)
    assert mixed.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
    torch.testing.assert_close(mixed.double(), exact, rtol=0, atol=2e-2)
